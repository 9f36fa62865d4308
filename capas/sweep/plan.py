"""Define what all trials of a sweep have in common, fixed at its start and read by every worker.

.dvc/tmp/sweep/
    plans/KEY/       one sweep: plan.json, conf/ as it was, points/NAME.json, logs/NAME.log, rungs/NAME.json
    work/NAME/       the workspace of a trial, while it runs or after it failed
    locks/, done/    which process runs a stage, and which stages the cache holds
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capas.compare.outputs import Outputs
from capas.config.composition import CONF
from capas.core import dag, inputs, links
from capas.core.errors import CapasError
from capas.core.files import file_sha256, write_whole
from capas.core.worktree import Snapshot, git, snapshot
from capas.workspace.clone import cache_of, stored

FOLDER = Path(".dvc/tmp/sweep")
VARIABLE = "CAPAS_SWEEP"  # names the plan's folder
DRIVER = "CAPAS_SWEEP_DRIVER"  # the process that started the sweep
AT_ONCE = "CAPAS_SWEEP_AT_ONCE"  # how many trials can run at a time, whatever the launcher
_TRIALS = "trials.json"
_REVISIONS = "conf/revisions.yaml"


@dataclass(frozen=True)
class Plan:
    """The fixed facts of a sweep.

    Attributes:
        words: the user's overrides, such as `lora.r=8,16`.
        inputs: a digest of all files that decide a result.
        ignored: the input files that git ignores.
        swept: the keys that the sweep varies. They name its trials, and do not decide its key.
    """

    home: Path
    key: str
    words: tuple[str, ...]
    commit: str
    tree: str
    inputs: str
    ignored: tuple[str, ...]
    cache: Path
    swept: tuple[str, ...] = ()

    @property
    def base(self) -> Path:
        return self.home / FOLDER

    @property
    def folder(self) -> Path:
        return self.base / "plans" / self.key

    @property
    def points(self) -> Path:
        return self.folder / "points"

    @property
    def taken(self) -> Snapshot:
        return Snapshot(self.commit, self.tree)

    def work(self, experiment: str) -> Path:
        return self.base / "work" / experiment

    def lock(self, name: str) -> Path:
        return self.base / "locks" / name

    def copy_of(self, ignored: str) -> Path:
        """Return the copy of an input that git ignores, as it was when the sweep started."""
        return self.folder / "inputs" / ignored

    def reference(self, experiment: str) -> str:
        """Return the git reference under which DVC stores an experiment of this commit."""
        return f"refs/exps/{self.commit[:2]}/{self.commit[2:]}/{experiment}"

    def recorded(self, experiment: str) -> dict[str, Any]:
        """Return the stages of an experiment's dvc.lock."""
        text = git(self.home, "show", f"{self.reference(experiment)}:dvc.lock")
        stages: dict[str, Any] = dag.parse_yaml(text, "dvc.lock")["stages"]
        return stages

    def outputs(self, experiment: str) -> Outputs:
        """Return the outputs of an experiment, as far as they are on this machine."""
        return Outputs(self.home, self.recorded(experiment))

    def stored(self, md5: str) -> Path:
        """Return the path at which DVC's cache stores the file with this hash, whether or not it exists."""
        return stored(self.cache, md5)

    @classmethod
    def make(cls, home: Path, words: list[str], swept: Iterable[str] = ()) -> "Plan":
        """Return the plan for the workspace as it is now, with uncommitted edits and untracked files."""
        taken = snapshot(home)
        found = inputs.ignored(home, taken.tree)
        ignored = tuple(name for name in found if not name.startswith(f"{CONF}/"))
        deciding = _deciding(home, taken, {name: home / name for name in ignored})
        own = {name: file_sha256(home / name) for name in found if name.startswith(f"{CONF}/")}
        listed = git(home, "ls-tree", "-r", taken.tree, "--", str(CONF))
        return cls(
            home=home,
            key=digest(sorted(words), taken.commit, deciding, listed, own),
            words=tuple(words),
            commit=taken.commit,
            tree=taken.tree,
            inputs=deciding,
            ignored=ignored,
            cache=cache_of(home),
            swept=tuple(swept),
        )

    def write(self) -> None:
        """Write the folder: conf/ and the ignored inputs are copied, so that later edits reach no trial.

        Raises:
            CapasError: an input was edited in the meantime.
        """
        for folder in (self.points, self.folder / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        conf = self.folder / CONF
        if not conf.exists():
            partial = self.folder / f".{CONF}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self.home / CONF, partial, ignore=shutil.ignore_patterns("*.partial"))
            partial.rename(conf)
        self._copy_ignored()
        facts = {**asdict(self), "home": str(self.home), "cache": str(self.cache)}
        write_whole(self.folder / "plan.json", json.dumps(facts, indent=2) + "\n")

    def _copy_ignored(self) -> None:
        """Copy all ignored inputs, or none if stopped or edited meanwhile: the trials' ids depend on them."""
        whole = self.copy_of("")
        if whole.exists() or not self.ignored:
            return
        partial = whole.with_name(f".{whole.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name in self.ignored:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            links.place(self.home / name, partial / name)
        copies = {name: partial / name for name in self.ignored}
        if _deciding(self.home, self.taken, copies) != self.inputs:
            raise CapasError(
                f"a file was edited while the sweep copied it, one of: {', '.join(self.ignored)}. "
                "Start the sweep again"
            )
        partial.rename(whole)

    def write_trials(self, trials: Sequence[tuple[Sequence[str], dict[str, Any]]]) -> None:
        """Write the overrides and the values of numbered trials: Hydra is given the numbers."""
        write_whole(self.folder / _TRIALS, json.dumps(trials))

    def trial(self, number: int) -> tuple[list[str], dict[str, Any]]:
        """Return the overrides and the values of a numbered trial."""
        overrides, values = json.loads((self.folder / _TRIALS).read_text(encoding="utf-8"))[number]
        return overrides, values

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        facts = {"swept": (), **json.loads((folder / "plan.json").read_text(encoding="utf-8"))}
        lists = {name: tuple(facts[name]) for name in ("words", "ignored", "swept")}
        paths = {name: Path(facts[name]) for name in ("home", "cache")}
        return cls(**{**facts, **lists, **paths})

    @classmethod
    def current(cls) -> "Plan":
        """Return the plan of the sweep that started this process, whatever the launcher."""
        return cls.read(Path(os.environ[VARIABLE]))


def check_home(home: Path) -> None:
    """Check that `home` is the top folder of a git repository with DVC.

    Raises:
        CapasError: it is not.
    """
    if not (home / "dvc.yaml").exists() or not (home / ".dvc").is_dir():
        raise CapasError(f"{home} has no dvc.yaml; start it in the repository's top folder")
    if folder := git(home, "rev-parse", "--show-prefix"):
        raise CapasError(
            f"{home} is the folder {folder} of a larger git repository, but a sweep needs a "
            "repository of its own to clone. Move the folder out, or run `git init` in it"
        )


def digest(*parts: Any) -> str:
    """Return a digest that is short enough for a name."""
    return dag.digest(*parts)[:10]


def _deciding(home: Path, taken: Snapshot, ignored: Mapping[str, Path]) -> str:
    """Return a digest of all files that decide a result, including those that git ignores."""
    return digest(_files(home, taken), {name: file_sha256(file) for name, file in ignored.items()})


def _files(home: Path, taken: Snapshot) -> list[str]:
    """Return mode, id and path of each file in git that decides a result.

    Of conf/ this keeps the pins and the files that values name, such as templates. The other files of conf/
    only hold values, which are compared separately.
    """
    listed = git(
        home, "ls-tree", "-r", taken.tree, "--", "dvc.yaml", *inputs.external(home)
    ).splitlines()
    inside = f"{CONF}/"
    return [
        line
        for line in listed
        if not (path := line.partition("\t")[2]).startswith(inside)
        or not path.endswith(".yaml")
        or path == _REVISIONS
    ]
