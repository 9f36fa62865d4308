"""A folder for one point: the files as the sweep found them, with the cache of the user's repository."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from capas import links
from capas.params import flatten
from capas.stage import CHECKPOINTS
from capas.store import HOME
from capas.sweep.plan import Plan
from capas.worktree import clone

_OF_ANOTHER_RUN = re.compile(r"(DVC|GIT|HYDRA|CAPAS)_")


def lay_out(plan: Plan, work: Path, values: dict[str, Any]) -> None:
    """Make the workspace anew; the checkpoints of one that was left go on in it: they are worth hours."""
    saved = plan.base / "checkpoints" / work.name
    if any((work / CHECKPOINTS).glob("*/*")):
        shutil.rmtree(saved, ignore_errors=True)
        saved.parent.mkdir(parents=True, exist_ok=True)
        (work / CHECKPOINTS).rename(saved)
    shutil.rmtree(work, ignore_errors=True)
    clone(plan.home, plan.taken, work)
    if saved.exists():
        (work / CHECKPOINTS).parent.mkdir(parents=True, exist_ok=True)
        saved.rename(work / CHECKPOINTS)
    _share_cache(plan, work)
    for name in plan.ignored:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        links.place(plan.copy_of(name), work / name, immutable=True)
    for value in flatten(values).values():
        _bring(plan.home, work, value)


def environment(plan: Plan, work: Path) -> dict[str, str]:
    """Of the commands in it: its own code, this Python, nothing of a DVC or a git around it."""
    inherited = {k: v for k, v in os.environ.items() if not _OF_ANOTHER_RUN.match(k)}
    path = [str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]
    python = [str(work), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        **inherited,
        HOME: str(plan.home),
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join(python),
        "PYTHONUNBUFFERED": "1",
        "DVC_SITE_CACHE_DIR": str(work / ".dvc/tmp/site"),  # or each leaves a folder in /var/tmp
        "DVC_NO_ANALYTICS": "1",
    }


def _share_cache(plan: Plan, work: Path) -> None:
    """The user's local settings of DVC, less what must differ; results are linked, not copied."""
    from configobj import ConfigObj

    local = ConfigObj(str(plan.home / ".dvc/config.local"))
    local["cache"] = {**local.get("cache", {}), "dir": str(plan.cache)}
    local.filename = str(work / ".dvc/config.local")
    local.write()


def _bring(home: Path, work: Path, value: Any) -> None:
    """A value that names a file or folder which git does not have, say a model: linked."""
    if isinstance(value, list):
        for item in value:
            _bring(home, work, item)
    if not isinstance(value, str) or not value or Path(value).is_absolute() or len(value) > 255:
        return
    there, here = (home / value).resolve(), work / value
    if there.exists() and home in there.parents and not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.symlink_to(there)
