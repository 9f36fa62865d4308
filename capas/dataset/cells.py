"""The rows of a parquet file: the columns that are needed, whatever the cells hold."""

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
    """Every row as {column: value}.

    Args:
        needed: the columns to read, of those that there are; the others are counted in `file.unread`.

    Raises:
        CapasError: a row group is larger than its number of rows allows.
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
    """As many rows of average size as stay within a buffer."""
    largest = 1
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        largest = max(largest, group.total_byte_size // max(1, group.num_rows))
    if largest > 4 * max_characters:
        raise CapasError(too_large(f"{name}, a record of {largest:,} bytes", max_characters))
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // largest))


def _values(batch: pa.RecordBatch) -> list[Any]:
    """Arrow makes Python's values of a whole batch; where it cannot, they are made one by one."""
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
    """A text that is no UTF-8 keeps its bytes as halves of surrogate pairs: a flaw, named where it stands."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar):
        return scalar.as_buffer().to_pybytes().decode("utf-8", LENIENT)
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(value) for name, value in scalar.items()}
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar):
        return [_value(value) for value in scalar.values]
    return scalar.as_py()
