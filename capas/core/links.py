"""Place large files a second time without copying their bytes, if possible."""

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
    """Give `target` the content of `source`, and return the way: reflink, hardlink or copy.

    Args:
        immutable: whether `source` is never written to in place, so that a hard link is as good as a copy.
    """
    source = source.resolve()  # the caches of the Hub and of DVC may have symbolic links
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
