"""A word now and then from a stage that goes through many records."""

import logging
import time
from collections.abc import Iterable, Iterator

import pyarrow as pa

SECONDS_BETWEEN_WORDS = 10.0
log = logging.getLogger("capas")


class Pace:
    """`due()` is true once in a while."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last <= SECONDS_BETWEEN_WORDS:
            return False
        self._last = now
        return True


def told(tables: Iterable[pa.Table], split: str) -> Iterator[pa.Table]:
    """The same tables; how many records went by is logged while it takes long."""
    count, pace = 0, Pace()
    for table in tables:
        yield table
        count += table.num_rows
        if pace.due():
            log.info("%s: %d records so far", split, count)
