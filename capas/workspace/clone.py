"""A clone of the user's repository in which DVC runs: the user's cache, and the clone's own code."""

import os
import re
import sys
from pathlib import Path
from typing import Any

_OF_ANOTHER_RUN = re.compile(r"(DVC|GIT|HYDRA|CAPAS)_")


def environment(work: Path, **more: str) -> dict[str, str]:
    """Of the commands in it: its own code, this Python, nothing of a DVC or a git around it."""
    inherited = {k: v for k, v in os.environ.items() if not _OF_ANOTHER_RUN.match(k)}
    path = [str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]
    python = [str(work), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        **inherited,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join(python),
        "PYTHONUNBUFFERED": "1",
        "DVC_SITE_CACHE_DIR": str(work / ".dvc/tmp/site"),  # or each leaves a folder in /var/tmp
        "DVC_NO_ANALYTICS": "1",
        **more,
    }


def cache_of(home: Path) -> Path:
    """Where DVC keeps its cache, which any of its configuration files may say."""
    from dvc.config import Config

    folder = Config(str(home / ".dvc"))["cache"].get("dir")
    return Path(folder) if folder else home / ".dvc/cache"


def stored(cache: Path, md5: str) -> Path:
    """Where DVC's cache has what has this hash, if it does."""
    return cache / "files/md5" / md5[:2] / md5[2:]


def share_cache(home: Path, cache: Path, work: Path) -> None:
    """The user's local settings of DVC, less what must differ; results are linked, not copied.

    A remote's relative paths (its url, a key) count from the user's repository: they are made absolute.
    """
    from configobj import ConfigObj
    from dvc.config import Config

    local = ConfigObj(str(home / ".dvc/config.local"))
    local["cache"] = {**local.get("cache", {}), "dir": str(cache)}
    config = Config(str(home / ".dvc"))
    for level in config.REPO_LEVELS:
        for name, options in config.load_one(level)["remote"].items():
            section = f'remote "{name}"'
            local[section] = {**local.get(section, {}), **options}
    local.filename = str(work / ".dvc/config.local")
    local.write()


def bring(home: Path, work: Path, value: Any) -> None:
    """A value that names a file or folder which git does not have, say a model: linked."""
    if isinstance(value, list):
        for item in value:
            bring(home, work, item)
    if not isinstance(value, str) or not value or Path(value).is_absolute() or len(value) > 255:
        return
    there, here = (home / value).resolve(), work / value
    if there.exists() and home in there.parents and not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.symlink_to(there)
