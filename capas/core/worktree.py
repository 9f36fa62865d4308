"""The working tree as git sees it, with what is not committed, and other folders made of it.

What git ignores is no part of it: DVC's outputs, and what lies in data/own.
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

_PATCH = (  # whatever the user's configuration says of diffs
    *("--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-relative"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--submodule=short"),
)


class Snapshot(NamedTuple):
    """`commit` is HEAD; `tree`, a git tree, holds every file as it stands, untracked ones too."""

    commit: str
    tree: str


def git(root: Path, *arguments: str, check: bool = True, **env: str) -> str:
    """What a git command in `root` prints; empty where it fails and `check` is false.

    The variables with which a git hook, or DVC, points to another repository are left out.

    Raises:
        CapasError: the command failed.
    """
    return git_bytes(root, *arguments, check=check, **env).decode().strip()


def snapshot(root: Path, keep: Callable[[Path], bool] = lambda file: True) -> Snapshot:
    """The working tree now; neither the files nor the user's index are touched.

    Args:
        keep: whether a file that the commit does not have is part of it.

    Raises:
        CapasError: `root` is no git repository, or has no commit yet.
    """
    try:
        commit = git(root, "rev-parse", "HEAD")
    except CapasError as error:
        raise CapasError(f"{root} needs a git repository with a commit: {error}") from None
    index = Path(git(root, "rev-parse", "--absolute-git-dir")) / "index"
    with TemporaryDirectory(prefix="capas-") as folder:
        own = Path(folder) / "index"
        if index.exists():
            shutil.copy2(index, own)  # its times and sizes spare git reading what did not change
        git(root, "add", "--all", GIT_INDEX_FILE=str(own))
        top = Path(git(root, "rev-parse", "--show-toplevel"))
        for name in _added(top, "--cached", "HEAD", GIT_INDEX_FILE=str(own)):
            if not keep(top / name):
                git(top, "update-index", "--force-remove", "--", name, GIT_INDEX_FILE=str(own))
        return Snapshot(commit, git(root, "write-tree", GIT_INDEX_FILE=str(own)))


def added(root: Path, taken: Snapshot) -> list[str]:
    """The files of the tree that the commit does not have, named from git's top folder."""
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
    """From the commit to the tree, as a patch for `git apply`; empty where all is committed."""
    return git_bytes(root, "diff", *_PATCH, taken.commit, taken.tree)


def clone(home: Path, taken: Snapshot, target: Path) -> None:
    """A clone of `home` in the new folder `target`: HEAD is the commit, files and index are the tree."""
    empty_clone(home, target)
    check_out(target, taken)


def empty_clone(home: Path, target: Path) -> None:
    """Without files. It borrows the objects of `home`; whoever commits there has his name of `home`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    git(target.parent, "clone", "--quiet", "--shared", "--no-checkout", str(home), str(target))
    for name in _IDENTITY:
        if value := git(home, "config", name, check=False):
            git(target, "config", name, value)


def check_out(target: Path, taken: Snapshot) -> None:
    git(target, "update-ref", "--no-deref", "HEAD", taken.commit)
    git(target, "read-tree", "-u", "--reset", taken.tree)


def git_bytes(root: Path, *arguments: str, check: bool = True, **env: str) -> bytes:
    """As `git`, byte for byte."""
    inherited = {k: v for k, v in os.environ.items() if k not in _ELSEWHERE}
    done = subprocess.run(
        ["git", *arguments], cwd=root, env={**inherited, **env}, capture_output=True, check=False
    )
    if done.returncode and check:
        reason = done.stderr.decode(errors="replace").strip()
        raise CapasError(f"git {' '.join(arguments[:2])} failed in {root}: {reason}")
    return done.stdout if not done.returncode else b""
