"""Large files in a second place without a second copy of their bytes."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

_FICLONE = 0x40049409  # ioctl_ficlone(2): both files share their blocks until one is written to
_UNSUPPORTED = {
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EPERM,
}


def place(source: Path, target: Path, immutable: bool = False) -> str:
    """Make `target` hold what `source` holds; returns how: reflink, hardlink or copy.

    Args:
        immutable: nobody writes to `source` in place, so a hard link is as good as a copy.
    """
    source = source.resolve()  # a hub's cache and DVC's may hold symbolic links
    if _reflink(source, target):
        return "reflink"
    if immutable or not source.stat().st_mode & 0o222:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _UNSUPPORTED | {errno.EMLINK}:
                raise
        else:
            return "hardlink"
    shutil.copyfile(source, target)
    return "copy"


def _reflink(source: Path, target: Path) -> bool:
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return True
    target.unlink()
    return False
