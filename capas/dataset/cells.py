"""Read the rows of a parquet file: only the needed columns, and cells of any type."""

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from capas.core.errors import CapasError
from capas.dataset.files import File
from capas.dataset.flaws import NOT_TEXT, Flaw
from capas.dataset.rows import Row, without_nulls_of_others
from capas.dataset.text import LENIENT, Reading, too_large

_ROWS_AT_ONCE, _BYTES_AT_ONCE = 1000, 2**26
Needed = Callable[[list[str]], list[str]]


def read_parquet(
    content: BinaryIO, file: File, reading: Reading, needed: Needed | None
) -> Iterator[Row]:
    """Yield every row as {column: value}.

    Args:
        needed: a function from the file's columns to those to read; the others are counted in `file.unread`.

    Raises:
        CapasError: the rows of a row group are too large on average.
    """
    number = 0
    with pq.ParquetFile(content, pre_buffer=False, buffer_size=2**20) as parquet:
        names = parquet.schema_arrow.names
        columns = needed(names) if needed else names
        for name in (name for name in names if name not in columns):
            file.unread[name] = file.unread.get(name, 0) + parquet.metadata.num_rows
        rows_at_once = _rows_at_once(parquet.metadata, file.name, reading.max_record_characters)
        for batch in parquet.iter_batches(rows_at_once, columns=columns):
            for value in _values(batch):
                number += 1
                yield Row(file.name, "record", number, value)


def _rows_at_once(metadata: Any, name: str, max_characters: int) -> int:
    """Return how many rows of average size fit into a buffer.

    Raises:
        CapasError: the average row of a row group is too large.
    """
    largest = 1
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        largest = max(largest, group.total_byte_size // max(1, group.num_rows))
    if largest > 4 * max_characters:
        raise CapasError(too_large(f"{name}, a record of {largest:,} bytes", max_characters))
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // largest))


def _values(batch: pa.RecordBatch) -> list[Any]:
    """Return the rows as Python values, converted cell by cell if Arrow cannot convert the whole batch."""
    try:
        return [without_nulls_of_others(value) for value in batch.to_pylist()]
    except (ValueError, OverflowError, ImportError):
        return [_row(batch, i) for i in range(batch.num_rows)]


def _row(batch: pa.RecordBatch, index: int) -> Any:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = _value(column[index])
        except (ValueError, OverflowError, ImportError) as error:
            shown = f"a value of the type {column.type}"
            return Flaw(NOT_TEXT, name, shown, f"the value cannot be read: {error}")
    return without_nulls_of_others(row)


def _value(scalar: pa.Scalar) -> Any:
    """Return a cell as a Python value; bytes that are not UTF-8 become lone surrogates, reported later."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar):
        return scalar.as_buffer().to_pybytes().decode("utf-8", LENIENT)
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(value) for name, value in scalar.items()}
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar):
        return [_value(value) for value in scalar.values]
    return scalar.as_py()
