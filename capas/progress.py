"""A word now and then from a stage that goes through many records."""

import logging
import time
from collections.abc import Iterable, Iterator

import pyarrow as pa

SECONDS_BETWEEN_WORDS = 10.0
log = logging.getLogger("capas")


def told(tables: Iterable[pa.Table], split: str) -> Iterator[pa.Table]:
    """The same tables; how many records went by is logged while it takes long."""
    count, last = 0, time.monotonic()
    for table in tables:
        yield table
        count += table.num_rows
        if time.monotonic() - last > SECONDS_BETWEEN_WORDS:
            last = time.monotonic()
            log.info("%s: %d records so far", split, count)
