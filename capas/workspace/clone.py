"""Set up a clone of the user's repository in which DVC runs: the user's cache, the clone's own code."""

import os
import re
import sys
from pathlib import Path
from typing import Any

_OF_ANOTHER_RUN = re.compile(r"(DVC|GIT|HYDRA|CAPAS)_")


def environment(work: Path, **more: str) -> dict[str, str]:
    """Return the environment for commands in the clone.

    It has the clone's own code and this Python, but no variables of an enclosing DVC or git.
    """
    inherited = {k: v for k, v in os.environ.items() if not _OF_ANOTHER_RUN.match(k)}
    path = [str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]
    python = [str(work), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        **inherited,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join(python),
        "PYTHONUNBUFFERED": "1",
        # without this, every clone leaves a folder in /var/tmp
        "DVC_SITE_CACHE_DIR": str(work / ".dvc/tmp/site"),
        "DVC_NO_ANALYTICS": "1",
        **more,
    }


def cache_of(home: Path) -> Path:
    """Return the folder of DVC's cache, which any of DVC's configuration files may set."""
    from dvc.config import Config

    folder = Config(str(home / ".dvc"))["cache"].get("dir")
    return Path(folder) if folder else home / ".dvc/cache"


def stored(cache: Path, md5: str) -> Path:
    """Return the path at which DVC's cache stores the file with this hash, whether or not it exists."""
    return cache / "files/md5" / md5[:2] / md5[2:]


def share_cache(home: Path, cache: Path, work: Path) -> None:
    """Give the clone the user's local DVC settings and cache.

    Relative paths of remotes (their url, a key) are made absolute, because they count from the user's
    repository.
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
    """Link a file or folder that a value names and that git does not have, for example a model."""
    if isinstance(value, list):
        for item in value:
            bring(home, work, item)
    if not isinstance(value, str) or not value or Path(value).is_absolute() or len(value) > 255:
        return
    there, here = (home / value).resolve(), work / value
    if there.exists() and home in there.parents and not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.symlink_to(there)
