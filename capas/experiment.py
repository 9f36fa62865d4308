"""Records the workspace before `dvc exp run`, and puts it back where the experiment fails or is killed.

DVC's plugin (.dvc/plugins/hydra_plugins/params_guard.py) calls `begin` before DVC writes params.yaml, and
`put_back` when the experiment fails. After SIGKILL, `capas restore` does the latter. Put back are the
generated files (`capas.generated`) and, by `dvc checkout`, the data; checkpoints stay, and so do edits that
the user made meanwhile. Replaced files are moved to .dvc/tmp/replaced/, never deleted.

DVC itself keeps the user's edits in a git stash for a moment, twice. An experiment that is killed in that
moment has them in the record, or in the stash alone, if there is no record yet.
"""

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

import psutil  # type: ignore[import-untyped]

from capas import unfinished
from capas.errors import CapasError
from capas.generated import is_generated, uncached
from capas.locks import BusyError, exclusive
from capas.unfinished import PREPARING, Before
from capas.worktree import git, git_bytes

REPLACED = Path(".dvc/tmp/replaced")
_RWLOCK = Path(
    ".dvc/tmp/exps/rwlock"
)  # DVC's own; who has the user's edits in a stash holds _STASHING
_STASHING = "refs/exps/stash"
_OF_EXPERIMENT = "dvc-exp:"  # in the subject of an experiment that DVC has stashed
_LEFT = (
    "EXEC_BASELINE",
    "EXEC_MERGE",
    "EXEC_BRANCH",
)  # references that DVC itself removes at the end
_LEFT_FILES = (".dvc/tmp/exps/run/workspace", ".dvc/tmp/repro.dat")
_MOVED = "checkout: moving from "
_process = ExitStack()  # holds the lock of each root in _held as long as this process lives
_held: set[Path] = set()


def begin(root: Path, words: list[str]) -> None:
    """Record the workspace, in DVC's process.

    Raises:
        CapasError: another experiment runs here, or was killed and not put back.
    """
    if left := unfinished.killed(root):
        raise CapasError(
            f"an earlier experiment was killed: `{left.command}`, of {left.started}. Put the workspace back "
            "first: capas restore   (or keep what it left: capas restore --keep)"
        )
    if root not in _held:
        try:
            _process.enter_context(exclusive(root / unfinished.HELD, seconds=0))
        except BusyError:
            raise CapasError("another `dvc exp run` is running in this workspace") from None
        _held.add(root)
    unfinished.write(root, _look(root, " ".join(["dvc", *map(shlex.quote, words[1:])])))


def _look(root: Path, command: str) -> Before:
    """Return the workspace as it stands while DVC has detached HEAD."""
    head = git(root, "rev-parse", "HEAD")
    stash = _stash_of_dvc(root, head)
    return Before(
        command=command,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        branch=_branch(root),
        head=head,
        tree=_tree(root),
        index=git(root, "rev-parse", f"{stash}^2^{{tree}}") if stash else git(root, "write-tree"),
    )


def _branch(root: Path) -> str:
    """Return the full reference that HEAD pointed to before DVC detached it, if it is known."""
    if branch := git(root, "symbolic-ref", "--quiet", "HEAD", check=False):
        return branch
    last = git(root, "reflog", "-1", "--format=%gs", "HEAD", check=False)
    branch = f"refs/heads/{last.removeprefix(_MOVED).partition(' to ')[0]}"
    known = last.startswith(_MOVED) and git(
        root, "rev-parse", "-q", "--verify", branch, check=False
    )
    return branch if known else ""


def _stash_of_dvc(root: Path, head: str) -> str:
    """Return the commit of the stash in which DVC has the user's edits; empty where there is none.

    DVC takes its lock before it makes the stash; a stash of the user's own is older. For a moment another
    stash, of the experiment, lies upon it.
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


def end_preparing(root: Path) -> None:
    """Drop the record of an experiment that ran elsewhere (`--temp`, `--queue`): DVC has put all back.

    Where it was interrupted twice, so that DVC has not, put it back.
    """
    before = unfinished.read(root)
    if before is None or before.phase != PREPARING:
        return
    head = git(root, "rev-parse", "HEAD")
    attached = git(root, "symbolic-ref", "--quiet", "HEAD", check=False)
    if attached == before.branch and not _stash_of_dvc(root, head):
        unfinished.drop(root)
        return
    sys.stderr.write(after_failure(root))


def after_failure(root: Path) -> str:
    """Put the workspace back in DVC's process, and return lines that say so; Ctrl-C waits for it."""
    before = unfinished.read(root)
    if before is None:
        return ""
    with _undisturbed():
        try:
            lines = put_back(root, before)
        except (CapasError, OSError) as error:
            lines = [f"the workspace could not be put back: {error}", "try again: capas restore"]
    return "".join(f"capas: {line}\n" for line in lines)


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


def left_in_stash(root: Path) -> Before | None:
    """Return what DVC holds in a stash, where it was killed before there was a record."""
    file = root / _RWLOCK
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))["write"].get(_STASHING)
    except (OSError, ValueError, KeyError):
        return None
    if holder is None or is_alive(holder) or unfinished.read(root):
        return None
    head = git(root, "rev-parse", "HEAD")
    stash = _stash_of_dvc(root, head)
    staged = git(root, "rev-parse", f"{stash}^2^{{tree}}") if stash else git(root, "write-tree")
    return Before(
        command=str(holder["cmd"]),
        started=datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        branch=_branch(root),
        head=head,
        tree=git(root, "rev-parse", f"{stash or head}^{{tree}}"),
        index=staged,
    )


def is_alive(holder: dict[str, object]) -> bool:
    """Return whether the process of an entry in DVC's lock files still runs, and is that one."""
    try:
        words = psutil.Process(int(str(holder["pid"]))).cmdline()
    except psutil.Error:
        return False
    return str(holder["cmd"]) in " ".join(words)


def put_back(root: Path, before: Before, keep: bool = False) -> list[str]:
    """Make the workspace what it was before the experiment, and return sentences that say so.

    Args:
        keep: leave the files and the data as the experiment left them; only HEAD and the staged files
            come back.

    Raises:
        CapasError: a git command failed; the record stays, so that it can be tried again.
    """
    head = git(root, "rev-parse", "HEAD")
    if not _is_where_it_was(root, before, head):
        clean_up(root, before)
        return [
            f"`{before.command}` did not end, and there are commits since: nothing is put back. It began at "
            f"{before.head[:7]}"
        ]
    said = _attach(root, before)
    if keep:
        said.append(f"the workspace stays as `{before.command}` left it")
    else:
        said += _put_files_back(root, before)
    git(root, "read-tree", before.index)
    git(
        root, "update-index", "-q", "--refresh", check=False
    )  # fails where a file differs: no error
    clean_up(root, before)
    return said


def _is_where_it_was(root: Path, before: Before, head: str) -> bool:
    """Return whether no commit was made since, but DVC's own of the experiment."""
    if head == before.head:
        return True
    subject, _, parent = git(root, "log", "-1", "--format=%s%n%P", head).partition("\n")
    return subject.startswith("dvc: commit experiment") and parent == before.head


def _attach(root: Path, before: Before) -> list[str]:
    """Give HEAD its branch again, unless the user chose another one since."""
    if git(root, "symbolic-ref", "--quiet", "HEAD", check=False):
        return []
    if not before.branch:
        git(root, "update-ref", "--no-deref", "HEAD", before.head)
        return []
    name = before.branch.removeprefix("refs/heads/")
    if git(root, "rev-parse", "-q", "--verify", before.branch, check=False) != before.head:
        return [f"the branch {name} has moved since: HEAD stays detached; git switch {name}"]
    git(root, "symbolic-ref", "-m", f"capas: back to {name}", "HEAD", before.branch)
    return [f"HEAD is the branch {name} again"]


def _put_files_back(root: Path, before: Before) -> list[str]:
    then, now = _blobs(root, before.tree), _hashes(root, _generated_now(root))
    wrong = [p for p in then if is_generated(p) and now.get(p) != then[p]]
    gone = [p for p in now if p not in then] if before.phase != PREPARING else []
    if before.phase == PREPARING:
        wrong += _reset_by_dvc(root, before, then)
    if kept := _move_aside(root, [*wrong, *gone]):
        kept = f"; the replaced ones are in {kept}"
    if wrong:
        git(root, "restore", f"--source={before.tree}", "--worktree", "--", *wrong)
    came_back = sorted([*wrong, *gone])
    if before.phase != PREPARING:
        _check_out_data(root)
        came_back.append("the data")
    listed = f"; back came {', '.join(came_back)}" if came_back else ""
    return [
        f"the workspace is as it was before `{before.command}`{listed}{kept}",
        "checkpoints stay: the same command goes on from the last one",
    ]


def _generated_now(root: Path) -> list[str]:
    listing = git_bytes(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = [*os.fsdecode(listing).split("\0"), *uncached(root)]
    return sorted({n for n in names if is_generated(n) and (root / n).is_file()})


def _blobs(root: Path, tree: str) -> dict[str, str]:
    """Return {path below root: object} of a git tree."""
    entries = os.fsdecode(git_bytes(root, "ls-tree", "-r", "-z", tree)).split("\0")
    parted = (entry.partition("\t") for entry in entries if entry)
    return {path: facts.split()[2] for facts, _, path in parted}


def _hashes(root: Path, paths: list[str]) -> dict[str, str]:
    """Return {path: object} of files in the workspace."""
    if not paths:
        return {}
    return dict(zip(paths, git(root, "hash-object", "--", *paths).split(), strict=True))


def _reset_by_dvc(root: Path, before: Before, then: dict[str, str]) -> list[str]:
    """Return the user's own files that DVC has reset to the commit, or was about to: they may be cut."""
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


def _move_aside(root: Path, paths: Iterable[str]) -> str:
    """Move the files that exist to a new folder, and return its name; empty where there are none."""
    there = [path for path in paths if (root / path).is_file()]
    folder = REPLACED / time.strftime("%Y%m%d-%H%M%S")
    for path in there:
        target = root / folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / path).rename(target)
    return str(folder) if there else ""


def _check_out_data(root: Path) -> None:
    """Bring the outputs of dvc.lock back from DVC's cache."""
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
    """Remove what DVC leaves behind where it is killed, and the record."""
    stash = _stash_of_dvc(root, before.head)
    staged = git(root, "rev-parse", f"{stash}^2^{{tree}}") if stash else ""
    is_ours = before.phase == PREPARING and staged == before.index
    for number, line in reversed(list(enumerate(_stashes(root)))):
        if _OF_EXPERIMENT in line or (is_ours and line.startswith(stash)):
            git(root, "stash", "drop", "--quiet", f"stash@{{{number}}}")
    for name in _LEFT:
        git(root, "update-ref", "--no-deref", "-d", f"refs/exps/exec/{name}", check=False)
    git(root, "update-ref", "-d", _STASHING, check=False)  # the next `dvc exp run` would run it
    for left in _LEFT_FILES:
        path = root / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (root / _RWLOCK).unlink(missing_ok=True)
    unfinished.drop(root)
