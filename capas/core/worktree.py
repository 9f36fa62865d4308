"""Capture the working tree as git sees it, with uncommitted changes, and create other folders from it.

Files that git ignores are not part of it: DVC's outputs, and the files in data/own.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from capas.core.errors import CapasError

_IDENTITY = ("user.name", "user.email")
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")

_PATCH = (  # options that override the user's configuration of diffs
    *("--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-relative"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--submodule=short"),
)


class Snapshot(NamedTuple):
    """A snapshot of the working tree: `commit` is HEAD, `tree` has all files, even untracked ones."""

    commit: str
    tree: str


def git(root: Path, *arguments: str, check: bool = True, **env: str) -> str:
    """Return the output of a git command in `root`; empty if the command fails and `check` is false.

    The environment variables with which a git hook or DVC points to another repository are removed.

    Raises:
        CapasError: the command failed, and `check` is true.
    """
    return git_bytes(root, *arguments, check=check, **env).decode().strip()


def snapshot(root: Path, keep: Callable[[Path], bool] = lambda file: True) -> Snapshot:
    """Return a snapshot of the working tree; neither the files nor the user's index are changed.

    Args:
        keep: a function that returns whether a file that is not in the commit belongs to the snapshot.

    Raises:
        CapasError: `root` is not a git repository, or has no commit yet.
    """
    try:
        commit = git(root, "rev-parse", "HEAD")
    except CapasError as error:
        raise CapasError(f"{root} needs a git repository with a commit: {error}") from None
    index = Path(git(root, "rev-parse", "--absolute-git-dir")) / "index"
    with TemporaryDirectory(prefix="capas-") as folder:
        own = Path(folder) / "index"
        if index.exists():
            shutil.copy2(index, own)  # with its times and sizes, git need not read unchanged files
        git(root, "add", "--all", GIT_INDEX_FILE=str(own))
        top = Path(git(root, "rev-parse", "--show-toplevel"))
        for name in _added(top, "--cached", "HEAD", GIT_INDEX_FILE=str(own)):
            if not keep(top / name):
                git(top, "update-index", "--force-remove", "--", name, GIT_INDEX_FILE=str(own))
        return Snapshot(commit, git(root, "write-tree", GIT_INDEX_FILE=str(own)))


def added(root: Path, taken: Snapshot) -> list[str]:
    """Return the files of the tree that are not in the commit, relative to git's top folder."""
    return _added(Path(git(root, "rev-parse", "--show-toplevel")), taken.commit, taken.tree)


def _added(top: Path, *which: str, **env: str) -> list[str]:
    names = git_bytes(
        top,
        "diff",
        "--name-only",
        "--no-renames",
        "--diff-filter=A",
        "-z",
        *which,
        check=True,
        **env,
    )
    return [name for name in os.fsdecode(names).split("\0") if name]


def difference(root: Path, taken: Snapshot) -> bytes:
    """Return the patch from the commit to the tree, for `git apply`; empty if all is committed."""
    return git_bytes(root, "diff", *_PATCH, taken.commit, taken.tree)


def clone(home: Path, taken: Snapshot, target: Path) -> None:
    """Clone `home` into the new folder `target`: HEAD is the commit, files and index are the tree's."""
    empty_clone(home, target)
    check_out(target, taken)


def empty_clone(home: Path, target: Path) -> None:
    """Clone `home` without files; the clone borrows its objects, and commits there use `home`'s author."""
    target.parent.mkdir(parents=True, exist_ok=True)
    git(target.parent, "clone", "--quiet", "--shared", "--no-checkout", str(home), str(target))
    for name in _IDENTITY:
        if value := git(home, "config", name, check=False):
            git(target, "config", name, value)


def check_out(target: Path, taken: Snapshot) -> None:
    git(target, "update-ref", "--no-deref", "HEAD", taken.commit)
    git(target, "read-tree", "-u", "--reset", taken.tree)


def git_bytes(root: Path, *arguments: str, check: bool = True, **env: str) -> bytes:
    """Return the output of a git command as bytes: see `git`.

    Raises:
        CapasError: the command failed, and `check` is true.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in _ELSEWHERE}
    done = subprocess.run(
        ["git", *arguments], cwd=root, env={**inherited, **env}, capture_output=True, check=False
    )
    if done.returncode and check:
        reason = done.stderr.decode(errors="replace").strip()
        raise CapasError(f"git {' '.join(arguments[:2])} failed in {root}: {reason}")
    return done.stdout if not done.returncode else b""
