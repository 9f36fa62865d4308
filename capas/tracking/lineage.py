"""Record where a published run comes from: its commit, its uncommitted changes, its adapter.

    git.base     the commit, one that the user's repository has
    git.tree     the git tree of all files as they were, including untracked ones
    git.dirty    whether there are uncommitted changes; then source/uncommitted.patch holds them
    git.folder   the repository's folder within git's repository, if it is not its top
    git.ignored  files that stages read and git ignores (data/own); their md5 is in source/ignored.json

A run keeps the state with which its artifacts were published; `capas rebuild` restores it.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.core import inputs
from capas.core.dag import StageSpec, ancestors, input_key, md5, recorded, recorded_key
from capas.core.errors import CapasError, without_secrets
from capas.core.files import read_json
from capas.core.stage import Stage, log
from capas.core.worktree import Snapshot, added, difference, git, snapshot
from capas.models import tuned_weights
from capas.tracking import live_sender, runs
from capas.tracking.client import Client, Run
from capas.tracking.store import USER, Store

BASE, TREE, DIRTY, FOLDER, IGNORED = (
    "git.base",
    "git.tree",
    "git.dirty",
    "git.folder",
    "git.ignored",
)
CHANGED, LEFT_OUT = "git.changed", "git.left_out"
ADAPTER = "adapter.sha256"
PATCH, IGNORED_FILES = "source/uncommitted.patch", "source/ignored.json"
UNKNOWN = "unknown"
MAX_PATCH_BYTES = 64 * 2**20
MAX_FILE_BYTES = 8 * 2**20  # size limit of an uncommitted file
# Names of files with keys and tokens: they are not sent unless they are committed.
_SECRET = (
    *(
        ".env",
        ".env.*",
        "*.env",
        ".envrc",
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "*.jks",
        "*.keystore",
    ),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.ppk", ".netrc", "_netrc", ".pgpass"),
    *(
        ".pypirc",
        ".npmrc",
        ".git-credentials",
        "*credentials*",
        "*secret*",
        "service-account*.json",
    ),
    *("token", "token.*", "*.token", "*_token", "*-token", "*_token.*", "*-token.*", "hf_token*"),
)
_EXAMPLE = ("*.example", "*.sample", "*.template", "*.pub")
_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----")
_WORD = re.compile(r"[\w-]{16,}", re.ASCII)  # long enough for a token
_HEADER = re.compile(rb"capas: from (?P<commit>[0-9a-f]+) to (?P<tree>[0-9a-f]+)\n")


@dataclass(frozen=True)
class State:
    """The files of the repository at one moment; `patch` and `ignored` are empty if there are none."""

    taken: Snapshot
    dirty: bool
    folder: str = ""
    patch: bytes = b""
    ignored: dict[str, str] = field(default_factory=dict)  # path -> md5
    left_out: str = ""
    added: tuple[str, ...] = ()  # files in the patch that no commit has
    stayed: tuple[str, ...] = ()  # uncommitted files left out: large, or possibly with a secret

    def tags(self) -> dict[str, str]:
        names = ", ".join(self.ignored)
        return {
            "mlflow.source.name": "dvc.yaml",
            "mlflow.source.git.commit": self.taken.commit,
            BASE: self.taken.commit,
            TREE: self.taken.tree,
            DIRTY: str(self.dirty).lower(),
            FOLDER: self.folder,
            IGNORED: names if len(names) < 500 else f"{len(self.ignored)} files",
            LEFT_OUT: self.left_out,
        }


def experiment(stage: Stage, train_key: str) -> str | None:
    """Return the name of this training's DVC experiment: the one that runs now, or one that was pulled."""
    if running := os.environ.get("DVC_EXP_NAME"):
        return running
    outs = recorded(stage.root)["train"].get("outs", [])
    adapter = next((out["md5"] for out in outs if out["path"] == tuned_weights.FOLDER), None)
    return runs.experiment_of(train_key, adapter, stage.root) if adapter else None


def author(stage: Stage, ran_here: bool) -> dict[str, str]:
    """Return the tag with the author: whoever works here, or whoever committed a pulled result."""
    if ran_here:
        return live_sender.author(stage.root)
    name = git(stage.root, "log", "-1", "--format=%an", "--", "dvc.lock", check=False)
    return {USER: name} if name else live_sender.author(stage.root)


def state_of(root: Path) -> State:
    """Return the repository's state at this moment.

    Raises:
        CapasError: it is not a git repository, or has no commit yet.
    """
    # If DVC runs an experiment elsewhere, HEAD may be a commit that exists only while it runs.
    stayed: list[Path] = []

    def keep(file: Path) -> bool:
        if travels(file):
            return True
        stayed.append(file)
        return False

    taken = snapshot(root, keep)
    base = os.environ.get("DVC_EXP_BASELINE_REV") or taken.commit
    taken = Snapshot(base, taken.tree)
    patch = difference(root, taken)
    ignored = {name: md5(root / name) for name in inputs.ignored(root, taken.tree)}
    left_out = _needed(root, stayed)
    dirty = bool(patch)
    if len(patch) > MAX_PATCH_BYTES:
        left_out = f"{PATCH}: it would take {len(patch) / 2**20:.0f} MiB"
        patch = b""
    folder = git(root, "rev-parse", "--show-prefix")
    names = tuple(os.path.relpath(file, root) for file in stayed)
    found = tuple(added(root, taken)) if patch else ()
    return State(taken, dirty, folder.rstrip("/"), patch, ignored, left_out, found, names)


def travels(file: Path) -> bool:
    """Return whether an uncommitted file is sent to MLflow.

    It is not sent if its name suggests a secret, if it is large, or if it is a text with a token in it.
    """
    name = file.name.lower()
    is_secret = any(fnmatch(name, pattern) for pattern in _SECRET)
    if is_secret and not any(fnmatch(name, pattern) for pattern in _EXAMPLE):
        return False
    if file.is_symlink():
        return True
    return file.stat().st_size <= MAX_FILE_BYTES and not _holds_token(file)


def _holds_token(file: Path) -> bool:
    """Return whether a text file contains a private key, or a token that `capas.core.errors` recognises."""
    content = file.read_bytes()
    if b"\0" in content:  # not a text file
        return False
    text = content.decode("utf-8", "replace")
    words = {*_WORD.findall(text)}  # words exclude URL characters: a URL's parts look like tokens
    return bool(_PRIVATE_KEY.search(text)) or any(without_secrets(word) != word for word in words)


def _needed(root: Path, stayed: list[Path]) -> str:
    """Return the unsent files that a stage reads: without them the run cannot be rebuilt."""
    deps = [root.resolve() / dep for spec in StageSpec.read_all(root).values() for dep in spec.deps]
    needed = [file for file in stayed if any(file.resolve().is_relative_to(dep) for dep in deps)]
    return ", ".join(os.path.relpath(file, root) for file in needed)


def send(store: Store, run: Run, stage: Stage, is_new: bool) -> None:
    """Send the present state with the artifacts, if the run has none or `is_new`.

    A state that leads back to the training is not replaced by one that does not.
    """
    have, run_id = run.tags, run.id
    tags = {ADAPTER: tuned_weights.sha256(stage.dep(tuned_weights.FOLDER))}
    is_known = have.get(BASE, UNKNOWN) != UNKNOWN
    if is_new or not is_known:
        tags |= _send_state(store, run_id, have, stage, is_known)
    wanted = {name: value for name, value in tags.items() if value or name in have}
    store.send_tags(run, wanted)  # one call, so that all tags describe one state


def _send_state(
    store: Store, run_id: str, have: Mapping[str, str], stage: Stage, is_known: bool
) -> dict[str, str]:
    """Send the state's files, and return its tags, which the caller writes all at once afterwards."""
    try:
        state = state_of(stage.root)
    except CapasError as error:
        log.warning("the run cannot be rebuilt from MLflow: %s", error)
        nowhere = {"mlflow.source.name": "dvc.yaml", "mlflow.source.git.commit": UNKNOWN}
        return {} if is_known else {**nowhere, BASE: UNKNOWN}
    lock = recorded(stage.root)
    changed = changed_since(stage.root, lock)
    if changed:
        log.warning(
            "edited after the stages ran: %s. `capas rebuild` would start from the edited files",
            ", ".join(changed),
        )
    if state.added:
        log.info("uncommitted files saved with the run in MLflow: %s", ", ".join(state.added))
    if state.stayed:
        log.warning(
            "uncommitted files not sent to MLflow, because they may contain a secret or exceed %d "
            "MiB: %s. Add them to .gitignore",
            *(MAX_FILE_BYTES // 2**20, ", ".join(state.stayed)),
        )
    if state.left_out:
        log.warning(
            "the run cannot be rebuilt without %s. Commit it, or add it to .gitignore",
            state.left_out,
        )
    key = read_json(stage.dep("reports/train.json"))["train_key"]
    if is_known and (changed or state.left_out or key != recorded_key(lock["train"])):
        return {}
    if state.ignored or have.get(IGNORED):
        facts = {"tree": state.taken.tree, "md5": state.ignored}
        store.client.log_text(run_id, json.dumps(facts, indent=2) + "\n", IGNORED_FILES)
    if state.patch or have.get(DIRTY) == "true":
        _send_patch(store, run_id, state)
    return {**state.tags(), CHANGED: ", ".join(changed)}


def _send_patch(store: Store, run_id: str, state: State) -> None:
    """Send the patch.

    Its first line, which git skips, names the commit and the tree. The patch is then usable whatever the tags
    say.
    """
    header = f"capas: from {state.taken.commit} to {state.taken.tree}\n".encode()
    with TemporaryDirectory(prefix="capas-") as folder:
        file = Path(folder) / Path(PATCH).name
        file.write_bytes(header + state.patch)
        store.client.log_artifact(run_id, str(file), str(Path(PATCH).parent))


def changed_since(root: Path, lock: Mapping[str, Any]) -> list[str]:
    """Return the stages up to train whose script, values or inputs have changed since they ran.

    compose is left out: this cannot tell files that editors leave in conf/ from files that compose read.
    """
    above = ancestors("train", lock) - {"compose"}
    specs = StageSpec.read_all(root)
    return [name for name in specs if name in above and not _is_as_it_ran(specs[name], root, lock)]


def _is_as_it_ran(spec: StageSpec, root: Path, lock: Mapping[str, Any]) -> bool:
    try:
        return input_key(spec, root) == recorded_key(lock[spec.name])
    except CapasError:  # a file that it read is gone
        return False


def read_state(client: Client, run: Run) -> State:
    """Return the state of a published run.

    Raises:
        CapasError: it has none, or its state cannot be restored.
    """
    tags = run.tags
    called = f"run {run.name} ({run.id[:8]})"
    if BASE not in tags:
        raise CapasError(
            f"{called} has no tag {BASE}: publishing never finished. Run `dvc repro publish` in the "
            "workspace that has its result"
        )
    if tags[BASE] == UNKNOWN:
        raise CapasError(
            f"{called} was published outside a git repository, so its code was not saved"
        )
    if tags.get(LEFT_OUT):
        raise CapasError(f"{called} cannot be restored; not saved with the run: {tags[LEFT_OUT]}")
    taken, dirty = Snapshot(tags[BASE], tags[TREE]), tags[DIRTY] == "true"
    patch = b""
    if dirty:
        taken, patch = _read_patch(client, run.id, called)
    ignored: dict[str, str] = {}
    if tags.get(IGNORED):
        facts = json.loads(client.read_artifact(run.id, IGNORED_FILES, called))
        ignored = facts["md5"]
    return State(taken, dirty, tags.get(FOLDER, ""), patch, ignored)


def _read_patch(client: Client, run_id: str, called: str) -> tuple[Snapshot, bytes]:
    """Return the patch with its commit and tree.

    These are known even if the publish was killed before it wrote the tags.
    """
    content = client.read_artifact(run_id, PATCH, called)
    header = _HEADER.match(content)
    if header is None:
        raise CapasError(f"{PATCH} of {called} is damaged: the commit and tree are missing")
    taken = Snapshot(header["commit"].decode(), header["tree"].decode())
    return taken, content[header.end() :]
