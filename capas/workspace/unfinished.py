"""Keep the record of an experiment that DVC runs in the workspace: how the workspace was before it.

`experiment` writes it when `dvc exp run` starts, and removes it when the experiment has ended and the
workspace is as it should be. A record whose process is gone belongs to an experiment that was killed.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from capas.core.files import write_whole
from capas.core.locks import is_held

RECORD = Path(".dvc/tmp/experiment.json")
HELD = Path(".dvc/tmp/experiment.lock")  # locked by DVC's process while it lives
PREPARING, RUNNING = "preparing", "running"


@dataclass(frozen=True)
class Before:
    """The workspace before an experiment.

    Args:
        command: the command as the user typed it.
        started: time in ISO format.
        branch: the full reference that HEAD pointed to; empty if HEAD was detached.
        head: the commit.
        tree: a git tree of the tracked files, and of the generated files that git ignores.
        index: a git tree of the staged files.
        stash: the commit of the stash in which DVC holds the user's edits while PREPARING; empty if there
            were none.
        phase: PREPARING while DVC may hold the user's edits in a stash, then RUNNING.
    """

    command: str
    started: str
    branch: str
    head: str
    tree: str
    index: str
    stash: str
    phase: str = PREPARING


def read(root: Path) -> Before | None:
    """Return the record; None if there is none."""
    file = root / RECORD
    return Before(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def write(root: Path, before: Before) -> None:
    write_whole(root / RECORD, json.dumps(asdict(before), indent=2) + "\n")


def mark_running(root: Path) -> None:
    """Record that the user's edits are back in their files."""
    if before := read(root):
        write(root, replace(before, phase=RUNNING))


def drop(root: Path) -> None:
    (root / RECORD).unlink(missing_ok=True)


def killed(root: Path) -> Before | None:
    """Return the record of an experiment whose process is gone."""
    return None if is_running(root) else read(root)


def is_running(root: Path) -> bool:
    return (root / HELD).exists() and is_held(root / HELD)
