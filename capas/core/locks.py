"""Locks between processes, which end with the process that holds them, however it ends."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_SECONDS_BETWEEN_TRIES = 0.1


class BusyError(Exception):
    """Another process holds the lock; `text` is what it wrote into the file."""

    def __init__(self, file: Path, text: str) -> None:
        super().__init__(f"{file.name} is held by another process")
        self.text = text


@contextmanager
def exclusive(file: Path, seconds: float = float("inf")) -> Iterator[TextIO]:
    """One process at a time in this block; gives the open file, empty, to write into.

    Raises:
        BusyError: another process holds it for longer than `seconds`.
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
    """Whether a process holds it now."""
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
