"""Read and write the records of a split as parquet; by fixed schemas, equal records give equal bytes.

One record grows from stage to stage::

    raw        id, messages [{role, content, extra, train}], tools, metadata        as fetched
    tokenized  id, messages [{role, content, extra, train, input_ids}], tools, metadata
    formatted  id, input_ids, labels, prompt_ids, reference, metadata

`extra` (tool_calls, tool_call_id, ... of a message), `tools` and `metadata` are JSON as text, because Arrow
would give each row the keys of all rows; `extra` and `tools` are "" if there are none. Calls and tools keep
the order of their keys, because the model is trained on it. `train: false` keeps an answer out of the loss. A
plain text is one message with the role `text`.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from capas.core.errors import CapasError

SPLITS = ("train", "validation", "test")
TEXT = "text"  # the role of a plain text: no template, every token trained
IGNORE_INDEX = -100  # label of a token outside the loss, as in torch.nn.CrossEntropyLoss
READ_BYTES = 2**20
ROWS_PER_GROUP = 2000  # rows in memory at once, whatever the size of the split

# Token ids and texts are too many for dictionaries; without them files are smaller and written faster.
_PARQUET = {"version": "2.6", "compression": "zstd", "use_dictionary": False}

Record = dict[str, Any]
T = TypeVar("T")


def _required(*fields: tuple[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field(name, kind, nullable=False) for name, kind in fields]


def _list_of(kind: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("element", kind, nullable=False))


_TEXT, _IDS = pa.string(), _list_of(pa.int32())
_SPOKEN = _required(("role", _TEXT), ("content", _TEXT), ("extra", _TEXT), ("train", pa.bool_()))
_ENCODED = [*_SPOKEN, *_required(("input_ids", _IDS))]


def _conversations(message: list[pa.Field]) -> pa.Schema:
    messages = _list_of(pa.struct(message))
    return pa.schema(
        _required(("id", _TEXT), ("messages", messages), ("tools", _TEXT), ("metadata", _TEXT))
    )


RAW, TOKENIZED = _conversations(_SPOKEN), _conversations(_ENCODED)
FORMATTED = pa.schema(
    _required(
        ("id", _TEXT),
        ("input_ids", _IDS),
        ("labels", _IDS),
        ("prompt_ids", _IDS),
        ("reference", _TEXT),
        ("metadata", _TEXT),
    )
)


def write_records(file: Path, schema: pa.Schema, records: Iterable[Record]) -> int:
    """Write `records` as they come, in row groups of a fixed size, and return their number."""
    groups = (pa.Table.from_pylist(group, schema=schema) for group in _groups(records))
    return write_tables(file, schema, groups)


def write_tables(file: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write the records of tables of any length, in row groups of a fixed size, and return their number.

    One group is written while the next is made.
    """
    count = 0
    with (
        pq.ParquetWriter(file, schema, **_PARQUET) as writer,
        ThreadPoolExecutor(1) as beside,
    ):
        writing = None
        for table in _regrouped(tables):
            if writing:
                writing.result()
            writing = beside.submit(writer.write_table, table)
            count += len(table)
        if writing:
            writing.result()
    return count


def read_records(file: Path, schema: pa.Schema) -> Iterator[Record]:
    """Yield the records of `file`, in order, with `ROWS_PER_GROUP` in memory at once.

    Raises:
        CapasError: the file is not a complete parquet file, or has other columns than `schema`.
    """
    for batch in read_batches(file, schema):
        yield from batch.to_pylist()


def read_batches(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the records of `file`, in order, `ROWS_PER_GROUP` at once.

    Raises:
        CapasError: the file is not a complete parquet file, or has other columns than `schema`.
    """
    try:
        # pre_buffer would keep the whole file in memory.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES) as parquet:
            if not parquet.schema_arrow.equals(schema):
                raise CapasError(_other_columns(file, parquet.schema_arrow, schema))
            yield from parquet.iter_batches(ROWS_PER_GROUP)
    except pa.ArrowInvalid as error:
        raise CapasError(
            f"{file} is not a complete parquet file ({error}). Delete it and run `dvc repro`"
        ) from None


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items, evenly spaced, because a split's records may be sorted by kind."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def before_last_answer(messages: Sequence[Record]) -> list[Record]:
    """Return the messages before the last answer, or all if there is none, as in a plain text."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return list(messages[: answers[-1]] if answers else messages)


def _other_columns(file: Path, found: pa.Schema, wanted: pa.Schema) -> str:
    def show(schema: pa.Schema) -> str:
        return ", ".join(f"{field.name}: {field.type}" for field in schema)

    return (
        f"{file} does not have the columns that this version of capas writes. Delete it and run "
        f"`dvc repro`.\n  found    {show(found)}\n  expected {show(wanted)}"
    )


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of ROWS_PER_GROUP rows; the last one may be shorter."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(map(len, pending)) >= ROWS_PER_GROUP:
            whole = pa.concat_tables(pending)
            for start in range(0, len(whole) - ROWS_PER_GROUP + 1, ROWS_PER_GROUP):
                yield whole.slice(start, ROWS_PER_GROUP).combine_chunks()
            pending = [whole.slice(len(whole) - len(whole) % ROWS_PER_GROUP)]
    if sum(map(len, pending)):
        yield pa.concat_tables(pending).combine_chunks()


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    for record in records:
        group.append(record)
        if len(group) == ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group
