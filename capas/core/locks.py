"""Lock files between processes; a lock ends with the process that holds it, even if it is killed."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_SECONDS_BETWEEN_TRIES = 0.1


class BusyError(Exception):
    """An error raised when another process holds the lock; `text` is that process's text in the file."""

    def __init__(self, file: Path, text: str) -> None:
        super().__init__(f"{file.name} is held by another process")
        self.text = text


@contextmanager
def exclusive(file: Path, seconds: float = float("inf")) -> Iterator[TextIO]:
    """Allow one process at a time in this block; yield the open file, empty, to write into.

    Raises:
        BusyError: another process holds the lock for longer than `seconds`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with file.open("a+") as lock:
        while not _taken(lock):
            if time.monotonic() >= deadline:
                lock.seek(0)
                raise BusyError(file, lock.read().strip())
            time.sleep(_SECONDS_BETWEEN_TRIES)
        lock.truncate(0)
        yield lock


def is_held(file: Path) -> bool:
    """Return whether a process holds the lock now."""
    try:
        with exclusive(file, seconds=0):
            return False
    except BusyError:
        return True


def _taken(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
