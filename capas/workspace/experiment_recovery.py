"""Record the workspace before `dvc exp run`, and restore it if the experiment fails or is killed.

DVC's plugin (.dvc/plugins/hydra_plugins/params_guard.py) calls `begin` before DVC writes params.yaml, and
`put_back` when the experiment fails. After SIGKILL, `capas restore` calls `put_back`. It restores the
generated files (`core.generated`) and, with `dvc checkout`, the data. Checkpoints stay, and so do edits that
the user made meanwhile. Replaced files are moved to .dvc/tmp/replaced/, never deleted.

DVC itself holds the user's edits in a git stash for a moment, twice. If an experiment is killed in that
moment, the edits are in the record, or only in the stash if there is no record yet.
"""

import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil  # type: ignore[import-untyped]

from capas.core import gitindex
from capas.core.errors import CapasError
from capas.core.generated import is_generated, uncached
from capas.core.locks import BusyError, exclusive
from capas.core.worktree import git, git_bytes
from capas.workspace import unfinished
from capas.workspace.unfinished import PREPARING, Before

REPLACED = Path(".dvc/tmp/replaced")
# DVC's own lock file; a process that has stashed the user's edits holds _STASHING in it
_RWLOCK = Path(".dvc/tmp/exps/rwlock")
_STASHING = "refs/exps/stash"
_OF_EXPERIMENT = "dvc-exp:"  # in the subject of a stashed experiment
# references that DVC itself removes at the end
_LEFT = ("EXEC_BASELINE", "EXEC_MERGE", "EXEC_BRANCH")
_LEFT_FILES = (".dvc/tmp/exps/run/workspace", ".dvc/tmp/repro.dat")
_MOVED = "checkout: moving from "
_process = ExitStack()  # holds the lock of each root in _held while this process lives
_held: set[Path] = set()


def begin(root: Path, words: list[str]) -> None:
    """Record the workspace, in DVC's process.

    Raises:
        CapasError: another experiment runs here, or was killed and not restored.
    """
    if left := unfinished.killed(root):
        raise CapasError(
            f"an earlier experiment was killed: `{left.command}`, started {left.started}. Restore the "
            "workspace first: capas restore   (or keep its files: capas restore --keep)"
        )
    if root not in _held:
        try:
            _process.enter_context(exclusive(root / unfinished.HELD, seconds=0))
        except BusyError:
            raise CapasError("another `dvc exp run` is running in this workspace") from None
        _held.add(root)
    unfinished.write(root, _look(root, " ".join(["dvc", *map(shlex.quote, words[1:])])))


def _look(root: Path, command: str) -> Before:
    """Return the workspace as it is while DVC has detached HEAD."""
    head = git(root, "rev-parse", "HEAD")
    stash = _stash_of_dvc(root, head)
    return Before(
        command=command,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        branch=_branch(root),
        head=head,
        tree=_tree(root),
        index=_index(root, stash),
        stash=stash,
    )


def _index(root: Path, stash: str) -> str:
    """Return a git tree of the staged files; while DVC has a stash, only the stash holds them."""
    return git(root, "rev-parse", f"{stash}^2^{{tree}}") if stash else git(root, "write-tree")


def _branch(root: Path) -> str:
    """Return the full reference that HEAD pointed to before DVC detached it; empty if unknown."""
    if branch := git(root, "symbolic-ref", "--quiet", "HEAD", check=False):
        return branch
    last = git(root, "reflog", "-1", "--format=%gs", "HEAD", check=False)
    branch = f"refs/heads/{last.removeprefix(_MOVED).partition(' to ')[0]}"
    known = last.startswith(_MOVED) and git(
        root, "rev-parse", "-q", "--verify", branch, check=False
    )
    return branch if known else ""


def _stash_of_dvc(root: Path, head: str) -> str:
    """Return the commit of the stash in which DVC holds the user's edits; empty if there is none.

    DVC takes its lock before it makes the stash; a stash of the user's own is older. For a moment a second
    stash, that of the experiment, is on top.
    """
    lock = root / _RWLOCK
    found = [line.split(" ", 3) for line in _stashes(root)]
    for commit, made, parent, subject in found:
        if _OF_EXPERIMENT not in subject:
            is_new = lock.exists() and int(made) >= int(lock.stat().st_mtime)
            return commit if is_new and parent == head else ""
    return ""


def _stashes(root: Path) -> list[str]:
    """Return `COMMIT TIME FIRST-PARENT SUBJECT` of each stash, the newest first."""
    lines = git(root, "stash", "list", "--format=%H %ct %P %gs", check=False).splitlines()
    return [re.sub(r"^(\S+ \S+ \S+)( [0-9a-f]{40})+ ", r"\1 ", line) for line in lines]


def _tree(root: Path) -> str:
    """Return a git tree of the tracked files, and of the outputs that only the workspace holds."""
    index = Path(git(root, "rev-parse", "--absolute-git-dir")) / "index"
    with TemporaryDirectory(prefix="capas-") as folder:
        own = Path(folder) / "index"
        shutil.copy2(index, own)
        git(root, "add", "--update", GIT_INDEX_FILE=str(own))
        if there := [path for path in uncached(root) if (root / path).is_file()]:
            git(root, "add", "--force", "--", *there, GIT_INDEX_FILE=str(own))
        return git(root, "write-tree", GIT_INDEX_FILE=str(own))


def at_exit(root: Path) -> None:
    """Restore the workspace at the end of DVC's process, unless the experiment succeeded.

    A queued experiment has changed nothing, unless it was interrupted while DVC cleaned up.
    """
    with _undisturbed():
        gc.collect()  # runs DVC's own clean-up, which an interruption may have delayed
        before = unfinished.read(root)
        if before is None:
            return
        try:
            if before.phase == PREPARING and _is_untouched(root, before):
                clean_up(root, before)
                return
            lines = put_back(root, before)
        except (CapasError, OSError) as error:
            lines = [f"the workspace could not be restored: {error}", "Try again: capas restore"]
        sys.stderr.write("".join(f"capas: {line}\n" for line in lines))


def _is_untouched(root: Path, before: Before) -> bool:
    """Return whether DVC has already undone what it changed to queue an experiment."""
    if gitindex.is_broken(root):
        return False
    attached = git(root, "symbolic-ref", "--quiet", "HEAD", check=False)
    stashed = before.stash and any(line.startswith(before.stash) for line in _stashes(root))
    return attached == before.branch and not stashed and not _wrong(root, before)


def end_elsewhere(root: Path) -> None:
    """Drop the record of an experiment that runs in its own folder, and let other experiments begin."""
    unfinished.drop(root)
    _process.close()
    _held.clear()


@contextmanager
def _undisturbed() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def left_in_stash(root: Path, guess: bool) -> Before | None:
    """Return the workspace as recorded in DVC's stash, if DVC was stopped before there was a record.

    Args:
        guess: also look for a stash of DVC if DVC's lock does not show one.
    """
    file, holder = root / _RWLOCK, _stashing(root)
    if holder and is_alive(holder):
        return None
    head = git(root, "rev-parse", "HEAD")
    stash = _stash_of_dvc(root, head) if holder else guess and _forgotten_stash(root, head)
    if not holder and not stash:
        return None
    stash = stash or ""
    started = file.stat().st_mtime if holder else int(git(root, "log", "-1", "--format=%ct", stash))
    return Before(
        command=str(holder["cmd"]) if holder else "dvc exp run",
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        branch=_branch(root),
        head=head,
        tree=git(root, "rev-parse", f"{stash or head}^{{tree}}"),
        index=_index(root, stash),
        stash=stash,
    )


def _forgotten_stash(root: Path, head: str) -> str:
    """Return the newest stash, if DVC detached HEAD from its commit within a second and files are reset.

    Pressing Ctrl-C twice just after `dvc exp run` begins leaves the user's edits there.
    """
    log = git(root, "log", "-g", "-20", "--date=unix", "--format=%gd %gs", "HEAD", check=False)
    moved = [line for line in log.splitlines() if _MOVED in line and line.endswith(f" to {head}")]
    times = [int(re.sub(r".*@\{(\d+)\}.*", r"\1", line)) for line in moved]
    if not times or git(root, "diff", "--name-only", "HEAD"):
        return ""
    commit, made, parent, _ = ([*_stashes(root), "- 0 - -"][0]).split(" ", 3)
    is_dvcs = any(0 <= time - int(made) <= 1 for time in times)
    return commit if parent == head and is_dvcs else ""


def stash_on_head(root: Path) -> list[str]:
    """Return a sentence about a stash that an interrupted DVC may have left, or the user may have made."""
    commit, made, parent, _ = ([*_stashes(root), "- 0 - -"][0]).split(" ", 3)
    if parent != git(root, "rev-parse", "HEAD", check=False):
        return []
    if not git(root, "diff", "--name-only", commit, check=False):
        return [
            f"git has a stash with the edits that are in your files ({commit[:7]}). If an interrupted `dvc "
            "exp run` left it, remove it: git stash drop"
        ]
    if git(root, "diff", "--name-only", "HEAD", check=False):
        return []
    when = datetime.fromtimestamp(int(made), UTC).isoformat(timespec="seconds")
    return [
        f"git has a stash of edits ({commit[:7]}, of {when}). If an interrupted `dvc exp run` "
        "stashed your edits, restore them: git stash pop --index"
    ]


def _stashing(root: Path) -> dict[str, Any] | None:
    """Return the entry of the process that holds DVC's lock for its experiment stash, if there is one."""
    try:
        locks = json.loads((root / _RWLOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    holder: dict[str, Any] | None = locks.get("write", {}).get(_STASHING)
    return holder


def is_alive(holder: dict[str, Any]) -> bool:
    """Return whether the process of an entry in DVC's lock files still runs and is the same process."""
    try:
        words = psutil.Process(int(str(holder["pid"]))).cmdline()
    except psutil.Error:
        return False
    return str(holder["cmd"]) in " ".join(words)


def put_back(root: Path, before: Before, keep: bool = False) -> list[str]:
    """Restore the workspace as it was before the experiment, and return sentences about it.

    Args:
        keep: leave the files and the data as the experiment left them; only HEAD and the staged files
            are restored.

    Raises:
        CapasError: a git command failed; the record stays, so that it can be tried again.
    """
    sentences = gitindex.mend(root, before.index)
    head = git(root, "rev-parse", "HEAD")
    if not _is_where_it_was(root, before, head):
        clean_up(root, before)
        return [
            f"`{before.command}` was interrupted, but there are newer commits: nothing was "
            f"restored. It began at {before.head[:7]}"
        ]
    sentences += _attach(root, before)
    if keep and before.phase != PREPARING:
        sentences.append(f"the workspace stays as `{before.command}` left it")
    else:
        sentences += _put_files_back(root, before)
    git(root, "read-tree", before.index)
    git(root, "update-index", "-q", "--refresh", check=False)  # fails if a file differs
    clean_up(root, before)
    return sentences


def _is_where_it_was(root: Path, before: Before, head: str) -> bool:
    """Return whether no commit was made since, except DVC's own commit of the experiment."""
    if head == before.head:
        return True
    subject, _, parent = git(root, "log", "-1", "--format=%s%n%P", head).partition("\n")
    return subject.startswith("dvc: commit experiment") and parent == before.head


def _attach(root: Path, before: Before) -> list[str]:
    """Return HEAD to its branch, unless the user chose another one since."""
    if git(root, "symbolic-ref", "--quiet", "HEAD", check=False):
        return []
    if not before.branch:
        git(root, "update-ref", "--no-deref", "HEAD", before.head)
        return []
    name = before.branch.removeprefix("refs/heads/")
    if git(root, "rev-parse", "-q", "--verify", before.branch, check=False) != before.head:
        return [
            (
                f"the branch {name} has moved since, so HEAD stays detached; to return: git switch "
                f"{name}"
            )
        ]
    git(root, "symbolic-ref", "-m", f"capas: back to {name}", "HEAD", before.branch)
    return [f"HEAD is back on the branch {name}"]


def _put_files_back(root: Path, before: Before) -> list[str]:
    wrong, gone = _wrong(root, before), []
    if before.phase != PREPARING:
        then = _blobs(root, before.tree)
        gone = [path for path in _generated_now(root) if path not in then]
    if kept := move_aside(root, [*wrong, *gone]):
        kept = f"; the replaced files are in {kept}"
    if wrong:
        git(root, "restore", f"--source={before.tree}", "--worktree", "--", *wrong)
    came_back = sorted([*wrong, *gone])
    if before.phase != PREPARING:
        _check_out_data(root)
        came_back.append("the data")
    listed = f"; restored: {', '.join(came_back)}" if came_back else ""
    return [
        f"the workspace is as it was before `{before.command}`{listed}{kept}",
        "checkpoints are kept: the same command resumes from the last one",
    ]


def _wrong(root: Path, before: Before) -> list[str]:
    """Return the files that the experiment or DVC has changed since the record."""
    then, now = _blobs(root, before.tree), _hashes(root, _generated_now(root))
    wrong = [path for path in then if is_generated(path) and now.get(path) != then[path]]
    return [*wrong, *(_reset_by_dvc(root, before, then) if before.phase == PREPARING else [])]


def _differ(root: Path, before: Before) -> list[str]:
    """Return the files with edits of the user that are not as they were."""
    then, head = _blobs(root, before.tree), _blobs(root, before.head)
    own = {p: then[p] for p in then if not is_generated(p) and then[p] != head.get(p)}
    here = _hashes(root, [path for path in own if (root / path).is_file()])
    return [path for path in own if here.get(path) != own[path]]


def _generated_now(root: Path) -> list[str]:
    listing = git_bytes(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = [*os.fsdecode(listing).split("\0"), *uncached(root)]
    return sorted({n for n in names if is_generated(n) and (root / n).is_file()})


def _blobs(root: Path, tree: str) -> dict[str, str]:
    """Return {path: object} of a git tree; a path outside of `root` begins with `..`."""
    listing = git_bytes(root, "ls-tree", "-r", "-z", "--full-tree", tree)
    parted = (entry.partition("\t") for entry in os.fsdecode(listing).split("\0") if entry)
    top = git(root, "rev-parse", "--show-cdup")
    prefix = git(root, "rev-parse", "--show-prefix")
    return {
        path.removeprefix(prefix) if path.startswith(prefix) else f"{top}{path}": facts.split()[2]
        for facts, _, path in parted
        if facts.split()[1] == "blob"
    }


def _hashes(root: Path, paths: list[str]) -> dict[str, str]:
    """Return {path: object} of files in the workspace."""
    if not paths:
        return {}
    return dict(zip(paths, git(root, "hash-object", "--", *paths).split(), strict=True))


def _reset_by_dvc(root: Path, before: Before, then: dict[str, str]) -> list[str]:
    """Return the user's own files that DVC reset to the commit, or truncated while resetting them."""
    head = _blobs(root, before.head)
    own = [path for path in then if not is_generated(path) and then[path] != head.get(path)]

    def is_reset(path: str) -> bool:
        file = root / path
        if not file.is_file():
            return True
        content = file.read_bytes()
        whole = (git_bytes(root, "cat-file", "blob", of[path]) for of in (head, then) if path in of)
        return any(version.startswith(content) for version in whole)

    here = _hashes(root, [path for path in own if (root / path).is_file()])
    return [path for path in own if here.get(path) != then[path] and is_reset(path)]


def move_aside(root: Path, paths: Iterable[str]) -> str:
    """Move the files that exist to a new folder, and return its name; empty if there are none."""
    there = [path for path in paths if (root / path).is_file()]
    folder = REPLACED / time.strftime("%Y%m%d-%H%M%S")
    for path in there:
        target = root / folder / path.replace("../", "__/")
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / path).rename(target)
    return str(folder) if there else ""


def _check_out_data(root: Path) -> None:
    """Restore the outputs of dvc.lock from DVC's cache."""
    command = [sys.executable, "-m", "dvc", "checkout", "--force", "--allow-missing", "--quiet"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_EXP", "GIT_"))}
    done = subprocess.run(
        command,
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    if done.returncode:
        raise CapasError(f"dvc checkout failed: {done.stderr.strip()}")


def clean_up(root: Path, before: Before) -> None:
    """Remove the record, and what DVC leaves behind if it is killed or interrupted twice."""
    is_back = before.stash and not _differ(root, before)
    for number, line in reversed(list(enumerate(_stashes(root)))):
        if _OF_EXPERIMENT in line or (is_back and line.startswith(before.stash)):
            git(root, "stash", "drop", "--quiet", f"stash@{{{number}}}")
    for name in _LEFT:
        git(root, "update-ref", "--no-deref", "-d", f"refs/exps/exec/{name}", check=False)
    git(root, "update-ref", "-d", _STASHING, check=False)  # the next `dvc exp run` would run it
    for left in _LEFT_FILES:
        path = root / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if (holder := _stashing(root)) and (holder["pid"] == os.getpid() or not is_alive(holder)):
        (root / _RWLOCK).unlink()
    unfinished.drop(root)
