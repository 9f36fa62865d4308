"""Merge a newer version of the repository: `make update`, or `python -m capas.workspace.update [UPSTREAM]`.

UPSTREAM is a remote, REMOTE/BRANCH, a URL or a folder. The default is the remote `upstream` or, if there is
none, `origin`. Conflicts in generated files are resolved (`capas.workspace.conflict`), others are listed.
"""

import subprocess
import sys
from pathlib import Path

from capas.core.errors import CapasError
from capas.core.worktree import git
from capas.workspace import restore

_DEFAULTS = ("upstream", "origin")


def main(upstream: str | None) -> int:
    """Return the exit code: 0 if it was merged, 1 if the user must resolve conflicts.

    Raises:
        CapasError: there is nothing to merge from, or git refuses.
    """
    root = Path.cwd()
    if busy := restore.running(root):
        raise CapasError(
            f"{busy} is running in this workspace. Wait for it or stop it, then try again"
        )
    if restore.is_conflicted(root):
        raise CapasError(
            "a merge is unfinished in this repository. Run capas restore, then git commit -a"
        )
    before = git(root, "rev-parse", "HEAD")
    remote, branch = where_from(root, upstream)
    git(root, "fetch", "--quiet", remote, branch)
    theirs = git(root, "rev-parse", "FETCH_HEAD")
    count = git(root, "rev-list", "--count", f"{before}..{theirs}")
    if count == "0":
        say(f"{remote} has nothing newer")
        return 0
    say(f"merging {count} commit(s) of {remote} {branch}")
    try:
        git(root, "merge", "--quiet", "--no-edit", "FETCH_HEAD")
        return 0
    except CapasError:
        if not git(root, "rev-parse", "-q", "--verify", "MERGE_HEAD", check=False):
            raise  # git refused, and its message says why
    # The merged code is new, but this process has loaded the old one: a new process restores.
    if code := subprocess.call([sys.executable, "-m", "capas.workspace.restore"], cwd=root):
        say("then finish the merge: git commit --no-edit")
        return code
    git(root, "commit", "--quiet", "--no-edit")
    return 0


def where_from(root: Path, upstream: str | None) -> tuple[str, str]:
    """Return the remote and the branch for `git fetch`.

    Raises:
        CapasError: none is named, and there is no remote.
    """
    remotes = git(root, "remote").split()
    if upstream is None:
        upstream = next((name for name in _DEFAULTS if name in remotes), None)
    if upstream is None:
        raise CapasError(
            "there is no git remote to update from. Name one: make update UPSTREAM=URL"
        )
    remote, slash, branch = upstream.partition("/")
    if remote in remotes and slash:
        return remote, branch
    return upstream, "HEAD"


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
    except CapasError as error:
        sys.exit(f"capas: {error}")
