"""Log periodic messages, so that no stage is silent for more than ten seconds."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

SECONDS_BETWEEN_MESSAGES = 9.0  # less than ten, so that no stage is silent for ten
log = logging.getLogger("capas")


class Activity:
    """An activity of a stage, described by `text`; `done` counts its steps, of `total` if that is known."""

    def __init__(self, text: str, total: int | None = None) -> None:
        self.text, self.total, self.done = text, total, 0

    def step(self, count: int = 1) -> None:
        self.done += count

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.text}, {self.done} so far" if self.done else self.text
        return f"{self.text}, {self.done} of {self.total}"


_activities: list[Activity] = []


class Rows(Protocol):
    """A protocol for pyarrow tables."""

    @property
    def num_rows(self) -> int: ...


T = TypeVar("T", bound=Rows)


@contextmanager
def doing(text: str, total: int | None = None) -> Iterator[Activity]:
    """Name the activity inside the block, for `heartbeat`; `step()` counts towards `total`."""
    activity = Activity(text, total)
    _activities.append(activity)
    try:
        yield activity
    finally:
        _activities.remove(activity)


def counted(tables: Iterable[T], text: str) -> Iterator[T]:
    """Yield the same tables, and count their records as an activity, for `heartbeat`."""
    with doing(text) as activity:
        for table in tables:
            yield table
            activity.step(table.num_rows)


class _LastMessage(logging.Handler):
    """A log handler that remembers the time of the last line."""

    def __init__(self) -> None:
        super().__init__()
        self.time = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.time = time.monotonic()


@contextmanager
def heartbeat(seconds: float = SECONDS_BETWEEN_MESSAGES) -> Iterator[None]:
    """Log the current activities whenever nothing was logged for `seconds`, until the block ends."""
    last, ended, started = _LastMessage(), threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(max(0.01, last.time + seconds - time.monotonic())):
            if time.monotonic() - last.time >= seconds:
                what = ": ".join(map(str, _activities)) or "working"
                log.info("%s (%.0f s)", what, time.monotonic() - started)

    log.addHandler(last)
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        log.removeHandler(last)
