"""Restore the workspace after a killed experiment, a truncated dvc.lock or a merge with conflicts.

    capas restore            repair what is broken and print what was done; nothing is lost
    capas restore --keep     keep the files that a killed experiment left and continue from them
    capas restore --ours     if both sides of a merge set a value, keep HEAD's; --theirs: the other side's

After a merge, conflicts in generated files (dvc.lock, params.yaml, reports, ...) are resolved; conflicts in
conf/ or in code are listed for you to resolve. `make repro` begins with this command. It refuses to run while
DVC runs in this workspace.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core import gitindex, lockfile
from capas.core.dag import StageSpec, read_yaml
from capas.core.errors import CapasError
from capas.core.files import write_whole
from capas.core.generated import LOCK, PARAMS, READ_BY_COMMANDS
from capas.core.locks import is_held
from capas.core.worktree import git
from capas.workspace import unfinished

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS_OF_GIT = 1.0
_RWLOCKS = (".dvc/tmp/rwlock", ".dvc/tmp/exps/rwlock")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep", action="store_true", help="keep the files that a killed experiment left behind"
    )
    sides = parser.add_mutually_exclusive_group()
    for side, whose in {"ours": "HEAD's", "theirs": "the other side's"}.items():
        sides.add_argument(
            f"--{side}",
            action="store_const",
            const=side,
            dest="prefer",
            help=f"in a conflict, keep {whose} value",
        )
    parser.add_argument("--quiet", action="store_true", help="print nothing if nothing is wrong")


def command(options: argparse.Namespace) -> int:
    """Return the exit code: 0 if the workspace is whole, 1 if the user must resolve something first.

    Raises:
        CapasError: this is not the repository's top folder, or DVC runs in this workspace.
    """
    root = Path.cwd()
    if not (root / "dvc.yaml").exists():
        raise CapasError(f"{root} has no dvc.yaml; run it in the repository's top folder")
    if busy := running(root):
        if options.quiet:
            return 0  # DVC itself waits for the other process, or reports it
        raise CapasError(
            f"{busy} is running in this workspace. Wait for it or stop it, then try again"
        )
    sentences, code = restore(root, options.keep, options.prefer, guess=not options.quiet)
    for line in sentences:
        sys.stderr.write(f"{line}\n")
    if not sentences and not options.quiet:
        sys.stderr.write("nothing to restore\n")
    return code


def restore(
    root: Path, keep: bool = False, prefer: str | None = None, guess: bool = True
) -> tuple[list[str], int]:
    """Repair what is broken; return sentences about it, and the exit code.

    Args:
        keep: keep the files that a killed experiment left behind.
        prefer: 'ours' or 'theirs', for a key that both sides of a merge set.
        guess: also look for edits that an interrupted DVC may have left in a stash.

    Raises:
        CapasError: it cannot be repaired without the user.
    """
    sentences = [
        *_drop_broken_locks(root),
        *_end_experiment(root, keep, guess),
        *gitindex.mend(root, "HEAD"),
    ]
    if is_conflicted(root):
        from capas.workspace import conflict

        found = conflict.find(root)
        if own := conflict.in_own_files(root, found):
            return [
                *sentences,
                "Conflicts in your own files. Resolve them and `git add` them:",
                *(f"  {line}" for line in own),
                "Then run `capas restore` again: it resolves the generated files.",
            ], 1
        sentences += conflict.resolve(root, found, prefer)
        sentences.append(
            "Now run `dvc repro`, then finish the merge: git commit -a, git rebase --continue, ..."
        )
    sentences += [*_heal_params(root), *_heal_lock(root)]
    if guess and not sentences:
        from capas.workspace.experiment_recovery import stash_on_head

        sentences = stash_on_head(root)
    return sentences, 0


def running(root: Path) -> str:
    """Return the DVC command or the stage that runs in this workspace; empty if none does."""
    if unfinished.is_running(root):
        return "`dvc exp run`"
    for holder in _holders(root):
        from capas.workspace.experiment_recovery import is_alive

        if is_alive(holder):
            return f"`{holder['cmd']}` (process {holder['pid']})"
    held = (file for file in (root / ".dvc/tmp").glob("stage-*.lock") if is_held(file))
    return next((f"the stage {file.stem.removeprefix('stage-')}" for file in held), "")


def _holders(root: Path) -> "Iterator[dict[str, Any]]":
    """Yield the entries of the processes that hold DVC's own locks, as far as they can be read."""
    for name in _RWLOCKS:
        try:
            locks = json.loads((root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        yield from locks.get("write", {}).values()
        yield from (holder for holders in locks.get("read", {}).values() for holder in holders)


def _drop_broken_locks(root: Path) -> list[str]:
    """Remove lock files that a killed process left: DVC's truncated ones, and git's without an owner."""
    sentences = []
    for lock in _git_locks(root):
        lock.unlink(missing_ok=True)
        sentences.append(f"removed git's {lock.name}, left by a killed process")
    for name in _RWLOCKS:
        file = root / name
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError:
            file.unlink()
            sentences.append(f"removed {name}, which was truncated")
    return sentences


def _git_locks(root: Path) -> list[Path]:
    """Return the lock files of git's index and references that no running git command holds.

    Raises:
        CapasError: a git command is running in this repository.
    """
    folder = git(root, "rev-parse", "--absolute-git-dir", check=False)
    if not folder:
        return []
    names = (
        "index.lock",
        "HEAD.lock",
        "packed-refs.lock",
        "refs/stash.lock",
        "refs/heads/**/*.lock",
    )
    found = [file for name in names for file in Path(folder).glob(name)]
    if not found:
        return []
    import psutil  # type: ignore[import-untyped]

    time.sleep(_SECONDS_OF_GIT)  # a short git command releases its lock within this time
    others = [p.info for p in psutil.process_iter(["name", "cwd"])]
    top = git(root, "rev-parse", "--show-toplevel")
    if any(str(p["name"]).startswith("git") and str(p["cwd"]).startswith(top) for p in others):
        raise CapasError(
            f"a running git command holds {found[0]}. Wait for it or end it, then try again"
        )
    return [file for file in found if file.exists()]


def _end_experiment(root: Path, keep: bool, guess: bool) -> list[str]:
    """Restore the workspace after an experiment that was killed."""
    from capas.workspace import experiment_recovery

    before = unfinished.read(root) or experiment_recovery.left_in_stash(root, guess)
    return experiment_recovery.put_back(root, before, keep) if before else []


def is_conflicted(root: Path) -> bool:
    """Return whether git has unmerged files, or a file that commands read has conflict markers."""
    if git(root, "ls-files", "--unmerged", check=False):
        return True
    files = (root / name for name in READ_BY_COMMANDS)
    return any(b"<<<<<<< " in file.read_bytes() for file in files if file.exists())


def _heal_params(root: Path) -> list[str]:
    """Move a params.yaml that is not valid YAML aside, and compose it from conf/."""
    file = root / PARAMS
    try:
        if file.exists():
            read_yaml(file)
        return []
    except CapasError as error:
        from capas.workspace.conflict import compose
        from capas.workspace.experiment_recovery import move_aside

        kept = move_aside(root, [PARAMS])
        compose(root, "--force")
        return [f"{error}", f"{PARAMS} was composed again from conf/; the old file is in {kept}"]


def _heal_lock(root: Path) -> list[str]:
    """Repair dvc.lock; `dvc repro` restores what it lacks from the run cache."""
    file = root / LOCK
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    committed = git(root, "show", f"HEAD:./{LOCK}", check=False)
    healed, problems = lockfile.heal(text, f"{committed}\n", StageSpec.read_all(root))
    if not problems:
        return []
    if healed:
        write_whole(file, healed)
    else:
        file.unlink()
    return [
        *problems,
        f"{LOCK} was repaired; `dvc repro` restores the rest from the run cache or runs it",
    ]


def main() -> int:
    """Run the command alone: `python -m capas.workspace.restore` imports no other command."""
    parser = argparse.ArgumentParser(
        prog="capas restore",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return command(parser.parse_args())
    except CapasError as error:
        sys.stderr.write(f"capas: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
