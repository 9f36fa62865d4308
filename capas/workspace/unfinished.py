"""The record of an experiment that DVC runs in the workspace: what stood there before it.

`experiment` writes it when `dvc exp run` starts, and removes it when the experiment has ended and the
workspace is as it should be. A record whose process is gone belongs to an experiment that was killed.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from capas.core.files import write_whole
from capas.core.locks import is_held

RECORD = Path(".dvc/tmp/experiment.json")
HELD = Path(".dvc/tmp/experiment.lock")  # by DVC's process as long as it lives
PREPARING, RUNNING = "preparing", "running"


@dataclass(frozen=True)
class Before:
    """The workspace before an experiment.

    Args:
        command: as it was typed.
        started: time in ISO format.
        branch: the full reference that HEAD pointed to; empty where HEAD was detached.
        head: the commit.
        tree: a git tree with the tracked files, and those generated ones that git ignores, as they stood.
        index: a git tree of what was staged.
        stash: the commit of the stash in which DVC has the user's edits while PREPARING; empty where there
            were none.
        phase: PREPARING while DVC may have the user's edits in a stash, then RUNNING.
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
    """Return the record; None where there is none."""
    file = root / RECORD
    return Before(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def write(root: Path, before: Before) -> None:
    write_whole(root / RECORD, json.dumps(asdict(before), indent=2) + "\n")


def mark_running(root: Path) -> None:
    """Note that the user's edits are back in their files."""
    if before := read(root):
        write(root, replace(before, phase=RUNNING))


def drop(root: Path) -> None:
    (root / RECORD).unlink(missing_ok=True)


def killed(root: Path) -> Before | None:
    """Return the record of an experiment whose process is gone."""
    return None if is_running(root) else read(root)


def is_running(root: Path) -> bool:
    return (root / HELD).exists() and is_held(root / HELD)
