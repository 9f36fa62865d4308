"""Make a folder for one trial: the files as the sweep found them, with the user's DVC cache."""

import shutil
from pathlib import Path
from typing import Any

from capas.core import links
from capas.core.params import flatten
from capas.core.stage import CHECKPOINTS
from capas.core.worktree import clone
from capas.sweep.plan import Plan
from capas.workspace.clone import bring, share_cache


def set_aside(plan: Plan, work: Path) -> Path:
    """Remove a trial's workspaces, under whatever name, and keep its checkpoints; return their folder."""
    identity = work.name.rpartition("-")[2]
    saved = plan.base / "checkpoints" / identity
    for earlier in sorted(work.parent.glob(f"*-{identity}")):
        if any((earlier / CHECKPOINTS).glob("*/*")):
            shutil.rmtree(saved, ignore_errors=True)
            saved.parent.mkdir(parents=True, exist_ok=True)
            (earlier / CHECKPOINTS).rename(saved)
        shutil.rmtree(earlier, ignore_errors=True)
    return saved


def lay_out(plan: Plan, work: Path, values: dict[str, Any]) -> None:
    """Make the workspace again, but keep the checkpoints of an earlier one: they are worth hours.

    The earlier one may have another name: another sweep, which varies other keys, can run the same trial.
    """
    saved = set_aside(plan, work)
    clone(plan.home, plan.taken, work)
    if saved.exists():
        (work / CHECKPOINTS).parent.mkdir(parents=True, exist_ok=True)
        saved.rename(work / CHECKPOINTS)
    share_cache(plan.home, plan.cache, work)
    for name in plan.ignored:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        links.place(plan.copy_of(name), work / name, immutable=True)
    for value in flatten(values).values():
        bring(plan.home, work, value)
