"""Train the adapter of an MLflow run again and compare its bytes.

    capas rebuild RUN             run id or its beginning, run name, or DVC experiment
    capas rebuild RUN --all       also evaluation, samples and report
    capas rebuild RUN --restore   take the adapter from DVC's cache or remote instead of training

The run's commit and its uncommitted changes are checked out into a separate folder. The stages before
training are restored from DVC's cache or remote if possible; training runs again. Your files, dvc.lock,
branches and MLflow are not changed.

Exit code: 0 identical bytes, 1 different bytes, 2 it cannot be rebuilt (the reason is printed), 130 stopped.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from capas.core import dag, links, timings
from capas.core.dag import StageSpec, ancestors, read_yaml, recorded, recorded_key
from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.locks import exclusive, is_held
from capas.core.params import flatten
from capas.core.process import follow
from capas.core.worktree import check_out, empty_clone, git
from capas.models import tuned_weights
from capas.tracking import runs
from capas.tracking.client import reachable
from capas.tracking.lineage import ADAPTER, CHANGED, State, read_state
from capas.tracking.store import TRAIN_KEY, existing, sqlite_uri, tracking_uri
from capas.workspace.clone import bring, cache_of, environment, share_cache, stored
from capas.workspace.reproduced import differences

FOLDER = Path(".dvc/tmp/rebuild")
FACTS = "reports/train.json"
_TOLD = ("Running stage", "Stage '")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run id or its beginning, run name, or DVC experiment")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--all", action="store_true", help="also run the stages after training")
    ways.add_argument(
        "--restore",
        action="store_true",
        help="take the adapter from DVC's cache or remote",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="rebuild in this new folder and keep it"
    )


def command(options: argparse.Namespace) -> int:
    root = Path.cwd()
    if not (root / "dvc.yaml").exists():
        raise CapasError(f"{root} has no dvc.yaml; start it in the repository's top folder")
    keep = options.keep.absolute() if options.keep else None
    if keep and keep.exists():
        raise CapasError(f"--keep {options.keep} already exists; name a new folder")
    with _terminated_as_interrupted():
        client = existing(root)
        with reachable(tracking_uri(root)):
            run = runs.find(client, options.run, root)
            state = read_state(client, run)
        _say(
            f"run {run.name} ({run.id}), commit "
            f"{state.taken.commit[:10]}{' with uncommitted changes' if state.dirty else ''}"
        )
        if run.tags.get(CHANGED):
            _say(f"edited between the run and its publishing: {run.tags[CHANGED]}")
        with _folder(root, keep) as work:
            rebuilt = Rebuilt(root, work, state, run)
            return rebuilt.restored() if options.restore else rebuilt.trained(options.all)


class Rebuilt:
    """A run's repository in the folder `work`, as it was when the run was published.

    Raises:
        CapasError: the run's commit has no dvc.lock, or its dvc.lock records no training.
    """

    def __init__(self, home: Path, clone: Path, state: State, run: Any) -> None:
        self._run, self._state, self._home = run, state, home
        lay_out(home, clone, state)
        self.work = clone / state.folder
        if not (self.work / "dvc.lock").exists():
            raise CapasError(
                f"commit {state.taken.commit[:10]} has no dvc.lock in {state.folder or '.'}"
            )
        self.lock = recorded(self.work)
        if "train" not in self.lock:
            raise CapasError("the dvc.lock published with this run has no training")
        if recorded_key(self.lock["train"]) != run.tags[TRAIN_KEY]:
            _say(
                "the run's training was accepted with `dvc commit` under other inputs; these "
                "inputs are used"
            )
        self._cache = cache_of(home)
        share_cache(home, self._cache, self.work)
        if state.ignored:
            _copy_ignored(home, self.work, state.ignored)
        for value in flatten(read_yaml(self.work / "params.yaml")).values():
            bring(home, self.work, value)
        self._log = home / FOLDER / f"{run.id}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)

    def restored(self) -> int:
        """Take the adapter from the cache or the remote, and return the exit code.

        Raises:
            CapasError: neither has the adapter.
        """
        self._pull(["train"])
        self._dvc("checkout", "--quiet", "train", allowed="cannot be restored")
        if not any((self.work / tuned_weights.FOLDER).glob("*.safetensors")):
            raise CapasError(
                "the adapter is neither in DVC's cache nor in a remote. To train it again, "
                "omit --restore"
            )
        return self._compared("restored")

    def trained(self, everything: bool) -> int:
        """Train again and return the exit code; the cache neither provides nor stores the adapter."""
        above = ancestors("train", self.lock) - {"train"}
        self._pull([name for name in self.lock if name in above])
        makers = {out["path"]: n for n, entry in self.lock.items() for out in entry.get("outs", [])}
        deps = [dep["path"] for dep in self.lock["train"].get("deps", [])]
        needed = sorted({makers[dep] for dep in deps if dep in makers})
        started = time.monotonic()
        if needed:
            self._dvc("repro", "--no-commit", *needed)
        self._dvc("repro", "--no-commit", "--force", "--single-item", "train")
        if everything:
            specs = StageSpec.read_all(self.work)
            rest = [name for name in specs if name not in {*above, "train", "publish"}]
            for name in rest:
                self._dvc("repro", "--no-commit", "--force", "--single-item", name)
        return self._compared(f"retrained in {time.monotonic() - started:.0f} s", everything)

    def _pull(self, stages: list[str]) -> None:
        """Pull from the remote what the cache lacks; the pipeline makes what is still missing."""
        from dvc.config import Config

        outs = [out for name in stages for out in self.lock[name].get("outs", [])]
        lacking = [
            out["path"]
            for out in outs
            if not (self.work / out["path"]).exists()
            and not stored(self._cache, out["md5"]).exists()
        ]
        if not lacking:
            return
        remote = Config(str(self.work / ".dvc"))["core"].get("remote")
        if not remote:
            _say(f"not in DVC's cache, and no DVC remote is configured: {', '.join(lacking)}")
            return
        _say(f"pulling {', '.join(lacking)} from the remote {remote}")
        self._dvc("pull", *stages, allowed=f"the remote {remote} does not have everything")

    def _dvc(self, *words: str, allowed: str = "") -> None:
        """Run DVC and print its stages as they begin; if `allowed` is given, a failure only prints it."""
        # the process that follows the training live must not write to the user's database
        own = self.work / ".dvc/tmp/mlflow.db"
        env = {k: v for k, v in environment(self.work).items() if not k.startswith("MLFLOW_")}
        env |= {"MLFLOW_TRACKING_URI": sqlite_uri(own), "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, "-m", "dvc", *words]
        try:
            for line in follow(command, self.work, env, self._log, lambda: None):
                if line.startswith(_TOLD) and "didn't change" not in line:
                    _say(line)
        except CapasError as error:
            if not allowed:
                raise
            reasons = [line for line in str(error).splitlines() if line.startswith("ERROR")]
            _say(" ".join([f"{allowed}.", *reasons]))

    def _compared(self, how: str, everything: bool = False) -> int:
        expected = self._run.tags[ADAPTER]
        found = tuned_weights.sha256(self.work / tuned_weights.FOLDER)
        sys.stdout.write(f"recorded  {expected}\nhere      {found}\n")
        differing = differences(self.lock, recorded(self.work))
        if found == expected and not (everything and differing):
            sys.stdout.write(f"The adapter is identical, byte for byte; {how}.\n")
            return 0
        same = (
            "The adapter is identical, but other results differ"
            if found == expected
            else "The adapter differs"
        )
        lines = [f"{same}; {how}.", *differing, *self._machine()]
        sys.stdout.write("\n".join(lines) + "\n")
        return 1

    def _machine(self) -> list[str]:
        """Return how this machine differs from the one that trained, as far as the run and the cache tell."""
        then, now = self._run.tags, timings.read(self.work).get("train", {})
        here = flatten({key: now[key] for key in ("cpu", "kernels") if key in now})
        differing = [(k, here[k], then[k]) for k in here if then.get(k, here[k]) != here[k]]
        md5 = {out["path"]: out["md5"] for out in self.lock["train"]["outs"]}.get(FACTS, "")
        old, new = stored(self._cache, md5), self.work / FACTS
        if md5 and old.exists() and new.exists():
            used, uses = (flatten(read_json(file).get("used", {})) for file in (old, new))
            differing += [(k, uses[k], used[k]) for k in uses if used.get(k, uses[k]) != uses[k]]
        return [
            f"{key}: {found} on this machine, {was} in the run" for key, found, was in differing
        ]


def lay_out(home: Path, target: Path, state: State) -> None:
    """Check out the recorded state in a clone.

    Raises:
        CapasError: the commit is not here and cannot be fetched, or the patch does not lead to the tree.
    """
    commit, tree = state.taken
    empty_clone(Path(git(home, "rev-parse", "--show-toplevel")), target)
    _fetch(home, target, commit)
    git(target, "read-tree", commit)
    if b"diff --git" in state.patch:
        file = target / ".git/uncommitted.patch"
        file.write_bytes(state.patch)
        git(target, "apply", "--cached", "--whitespace=nowarn", str(file))
    made = git(target, "write-tree")
    if made != tree:
        raise CapasError(
            f"commit {commit[:10]} and the patch give the tree {made[:10]}, but {tree[:10]} was "
            "recorded: the patch belongs to another run"
        )
    check_out(target, state.taken)


def _fetch(home: Path, target: Path, commit: str) -> None:
    """Fetch the commit into the clone from the repository's remotes, if the repository no longer has it."""
    if _has(target, commit):
        return
    remotes = git(home, "remote").split()
    for remote in remotes:
        url = git(home, "remote", "get-url", remote)
        url = str((home / url).resolve()) if (home / url).exists() else url
        _say(f"commit {commit[:10]} is not in this repository; fetching it from {remote}")
        # a server may refuse a commit that no branch names: then all references are fetched
        for what in (commit, "+refs/*:refs/fetched/*"):
            git(target, "fetch", "--quiet", "--no-tags", url, what, check=False)
            if _has(target, commit):
                return
    reason = (
        f"nor can it be fetched from {', '.join(remotes)}"
        if remotes
        else "and there is no git remote"
    )
    raise CapasError(
        f"commit {commit} is not in this repository, {reason}. It was never pushed, or was deleted"
    )


def _has(repository: Path, commit: str) -> bool:
    return bool(
        git(repository, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}", check=False)
    )


def _copy_ignored(home: Path, work: Path, ignored: dict[str, str]) -> None:
    """Copy the inputs that git ignores, if they have not changed.

    Raises:
        CapasError: one is missing or has changed.
    """
    wrong = []
    for name, md5 in ignored.items():
        if not (home / name).is_file():
            wrong.append(f"{name} is missing")
        elif dag.md5(home / name) != md5:
            wrong.append(f"{name} has changed")
        else:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            links.place(home / name, work / name)
    if wrong:
        raise CapasError(
            f"the training read files that git ignores: {'; '.join(wrong)}. Restore the versions "
            "that the run used (md5s: the run's artifact source/ignored.json)"
        )


@contextmanager
def _folder(root: Path, keep: Path | None) -> Iterator[Path]:
    """Yield a new folder that is always removed afterwards, unless it is kept.

    Folders of rebuilds that were killed are removed as well.
    """
    base = root / FOLDER
    for lock in base.glob("*.lock"):
        if not is_held(lock):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    base.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if keep:
            stack.callback(_say, f"kept: {keep}")
            yield keep
            return
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=base))
        stack.enter_context(exclusive(folder.with_suffix(".lock")))
        stack.callback(folder.with_suffix(".lock").unlink, missing_ok=True)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder / "clone"


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    sys.stderr.write(f"rebuild: {line}\n")
    sys.stderr.flush()
