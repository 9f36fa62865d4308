"""Store rows of different lengths as one flat array, for whole-array operations instead of loops."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row i is values[offsets[i] : offsets[i + 1]].

    values: [all items]; offsets: [rows + 1] int64, from 0 to the number of all items.
    """

    values: Array
    offsets: Array

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any] | Array], dtype: Any) -> "Ragged":
        offsets = offsets_of(np.fromiter(map(len, rows), np.int64, len(rows)))
        parts = [np.asarray(row, dtype) for row in rows]
        return cls(np.concatenate(parts) if parts else np.zeros(0, dtype), offsets)

    @classmethod
    def from_arrow(cls, column: pa.ListArray) -> "Ragged":
        """Return the rows of a column of lists without nulls."""
        offsets = from_arrow(column.offsets).astype(np.int64)
        return cls(from_arrow(column.flatten()), offsets - offsets[0])

    @property
    def starts(self) -> Array:
        return self.offsets[:-1]

    @property
    def lengths(self) -> Array:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Array:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: Array) -> "Ragged":
        return gather(self.values, self.starts[rows], self.lengths[rows])

    def to_arrow(self, kind: pa.DataType) -> pa.ListArray:
        """Return the rows as a column of the list type `kind`."""
        values = to_arrow(self.values, kind.value_type)
        offsets = to_arrow(self.offsets, pa.int32())
        return pa.ListArray.from_arrays(offsets, values, type=kind)


def from_arrow(values: pa.Array) -> Array:
    """Return numbers without nulls as an array, not copied; `to_numpy` would import pandas, half a second."""
    return np.from_dlpack(values)


def to_arrow(values: Array, kind: pa.DataType) -> pa.Array:
    """Return numbers as an Arrow array, not copied if they have that type; `pa.array` would import pandas."""
    values = np.ascontiguousarray(values, str(kind))
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def texts_to_arrow(texts: Sequence[str]) -> pa.StringArray:
    """Return texts as an Arrow array, without importing pandas: see `to_arrow`."""
    encoded = [text.encode() for text in texts]
    offsets = offsets_of(np.fromiter(map(len, encoded), np.int64, len(encoded)))
    starts, content = offsets.astype(np.int32), b"".join(encoded)
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(starts), pa.py_buffer(content))


def gather(pool: Array, starts: Array, lengths: Array) -> Ragged:
    """Return ragged rows, of which row i is pool[starts[i] : starts[i] + lengths[i]]."""
    offsets = offsets_of(lengths)
    return Ragged(pool[ranges(starts, lengths)], offsets)


def ranges(starts: Array, lengths: Array) -> Array:
    """Return the indices starts[i] ... starts[i] + lengths[i] - 1 of all ranges, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def concatenate(parts: Iterable[Ragged]) -> Ragged:
    """Return the rows of all parts, one part after the other; there must be at least one part."""
    all_parts = list(parts)
    lengths = np.concatenate([part.lengths for part in all_parts])
    return Ragged(np.concatenate([part.values for part in all_parts]), offsets_of(lengths))


def any_in_row(marks: Array, offsets: Array) -> Array:
    """Return [rows] bool: whether any of the items offsets[i] : offsets[i + 1] is marked."""
    before = offsets_of(marks)
    found: Array = before[offsets[1:]] > before[offsets[:-1]]
    return found


def offsets_of(lengths: Array) -> Array:
    """Return the start of each row with these lengths, and the end of the last: [rows + 1] int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
