"""Collect the records of all sources in a file, with a few numbers for each in memory (about 40 bytes).

The first pass reads, checks and writes the records in their order. The numbers then decide which records stay
and in which split, and a second pass over the file writes the splits.
"""

import hashlib
import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from capas.core.errors import CapasError
from capas.core.progress import doing
from capas.core.records import RAW, TEXT, Record, read_batches, write_tables
from capas.core.workers import in_order
from capas.dataset.conversation import check_record
from capas.dataset.flaws import MALFORMED, Flaw, Flaws, location, show
from capas.dataset.rows import Row
from capas.dataset.shapes import Columns, convert
from capas.dataset.splits import Digests, content_digest, digest, ordinals, prompt_digests

log = logging.getLogger("capas")
ROWS_PER_CHUNK, CHARACTERS_PER_CHUNK = 1000, 2**22
MAX_QUESTION = 4000  # characters of a question that are compared with other questions
MAX_DEPTH = 100  # pickle, which carries rows to other processes, supports a few hundred levels
_COLUMNS = {"content": "Q", "group": "Q", "prompt": "Q", "identity": "Q", "line": "I", "place": "I",
            "characters": "I"}  # fmt: skip
_CODES = {"source": "H", "split": "B"}


@dataclass(frozen=True)
class Part:
    """One split of one source."""

    source: int
    split: int
    shape: str
    columns: Columns
    system: str | None
    roles: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Chunk:
    """Some rows of one part, as read."""

    part: Part
    rows: list[Row]


class Numbers:
    """A few numbers for each record, as arrays: `numbers["prompt"]`, ..."""

    def __init__(self) -> None:
        self._numbers = {name: array(code) for name, code in {**_COLUMNS, **_CODES}.items()}
        self.places: dict[tuple[str, str], int] = {}  # {(file, unit): its number}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return np.frombuffer(self._numbers[name], self._numbers[name].typecode)

    def __len__(self) -> int:
        return len(self._numbers["split"])

    def append(self, row: Row, **numbers: int) -> None:
        place = self.places.setdefault((row.file, row.unit), len(self.places))
        for name, number in {**numbers, "line": row.number, "place": place}.items():
            self._numbers[name].append(number)

    def where(self, index: int) -> dict[str, str]:
        """Return the file and line of a record."""
        file, unit = list(self.places)[self["place"][index]]
        return {"file": file, "at": f"{unit} {self['line'][index]}"}

    def extend(self, later: "Numbers") -> None:
        places = [self.places.setdefault(place, len(self.places)) for place in later.places]
        for name, numbers in later._numbers.items():
            if name == "place":
                numbers = array(numbers.typecode, [places[number] for number in numbers])
            self._numbers[name].extend(numbers)


@dataclass(frozen=True)
class Checked:
    """The result of a chunk: records of `RAW`, with an id if the source has one; their numbers; the flaws."""

    records: pa.Table
    numbers: Numbers
    flaws: Flaws


def check_parts(parts: Iterable[tuple[Part, Iterable[Row]]], flaws: Flaws) -> Iterator[Checked]:
    """Yield the checked rows of every part, in order; their flaws are counted in `flaws`."""
    with doing("reading records") as reading:
        for checked in in_order(partial(check_chunk, flaws=flaws.fresh()), _chunks(parts)):
            flaws.add(checked.flaws)
            yield checked
            reading.step(checked.flaws.num_read)


def check_chunk(chunk: Chunk, flaws: Flaws) -> Checked:
    """Return the rows of a chunk as records, without those that have a flaw.

    Args:
        flaws: the policies; its counts do not change.
    """
    flaws, numbers = flaws.fresh(), Numbers()
    records = [r for row in chunk.rows if (r := _record(row, chunk.part, flaws, numbers))]
    return Checked(pa.Table.from_pylist(records, schema=RAW), numbers, flaws)


def _record(row: Row, part: Part, flaws: Flaws, numbers: Numbers) -> Record | None:
    """Return a row as a record, with its numbers appended to `numbers`, or None if it is left out."""
    flaws.num_read += 1
    found: Mapping[str, Any] = row.value if isinstance(row.value, Mapping) else {}
    try:
        found = convert(row.value, part.shape, part.columns, part.roles)
        record = check_record(found, flaws, part.roles)
    except Flaw as flaw:
        identity = found.get("id")
        flaws.refuse(flaw, row.place, "" if identity is None else str(identity))
        return None
    messages = record["messages"]
    group, prompt = prompt_digests(messages)  # without the system prompt that is added below
    if part.system is not None and messages[0]["role"] not in ("system", TEXT):
        record["messages"] = [_system(part.system), *messages]
    numbers.append(
        row,
        content=content_digest(record),
        group=group,
        prompt=prompt,
        identity=digest(record["id"]) if record["id"] else 0,
        source=part.source,
        split=part.split,
        characters=sum(len(message["content"]) for message in messages),
    )
    return record


class Pool:
    """The records in their file, and numbers for each, in the file's order: `pool["prompt"]`, ..."""

    def __init__(self, file: Path, flaws: Flaws) -> None:
        self._file, self._flaws, self.numbers = file, flaws, Numbers()

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.numbers[name]

    def __len__(self) -> int:
        return len(self.numbers)

    def fill(self, parts: Iterable[tuple[Part, Iterable[Row]]]) -> None:
        """Read, check and write every row.

        Raises:
            CapasError: a record has a flaw whose policy is an error, too many records were dropped, or there
                are none.
        """
        self.read(parts)
        log.info("%d records read, %d valid", self._flaws.num_read, len(self))
        self._flaws.log_dropped()
        self._flaws.check()
        if not len(self):
            raise CapasError("the dataset's sources contain no records")

    def read(self, parts: Iterable[tuple[Part, Iterable[Row]]]) -> None:
        """Read, check and write every row; rows with a flaw are left out and counted."""
        write_tables(self._file, RAW, self._records(parts))

    def _records(self, parts: Iterable[tuple[Part, Iterable[Row]]]) -> Iterator[pa.Table]:
        for checked in check_parts(parts, self._flaws):
            self.numbers.extend(checked.numbers)
            yield checked.records

    def location(self, index: int) -> str:
        """Return the file and line of a record as text, for a message."""
        return location(self.numbers.where(index))

    def examples(self, whys: Mapping[int, str]) -> list[dict[str, Any]]:
        """Return the places and questions of some records, with the reasons in `whys`, {index: reason}."""
        shown: list[dict[str, Any]] = []
        start = 0
        for batch in self._batches() if whys else ():
            for index in sorted(i for i in whys if start <= i < start + len(batch)):
                record = batch.slice(index - start, 1).to_pylist()[0]
                question = next(
                    (m["content"] for m in record["messages"] if m["role"] != "system"), ""
                )
                about = {
                    "id": record["id"],
                    "field": "",
                    "value": show(question),
                    "why": whys[index],
                }
                shown.append({**self.numbers.where(index), **about})
            start += len(batch)
        return shown

    def questions(self) -> Iterator[str]:
        """Yield each record's question: the messages before the first answer, or the start of a plain text.

        System messages are left out, and a question is cut after `MAX_QUESTION` characters.
        """
        for batch in self._batches():
            for messages in batch.column("messages").to_pylist():
                prompt = itertools.takewhile(lambda m: m["role"] != "assistant", messages)
                question = "\n".join(m["content"] for m in prompt if m["role"] != "system")
                yield question[:MAX_QUESTION]

    def write_split(
        self, file: Path, stays: NDArray[np.bool_], ids: "Identities"
    ) -> dict[str, Any]:
        """Write the records where `stays` is true, in their order.

        Returns:
            num_records, and a sha256 over ids and contents that does not depend on the version of pyarrow.
        """
        whole = hashlib.sha256()

        def tables() -> Iterator[pa.Table]:
            start = 0
            for batch in self._batches():
                mine = np.flatnonzero(stays[start : start + len(batch)])
                taken = batch.take(pa.array(mine))
                names = ids.of(taken.column("id").to_pylist(), mine + start)
                for name, content in zip(names, self["content"][mine + start], strict=True):
                    whole.update(f"{name} {content:016x}\n".encode())
                yield taken.set_column(0, RAW.field("id"), pa.array(names, pa.string()))
                start += len(batch)

        count = write_tables(file, RAW, tables())
        return {"num_records": count, "sha256": whole.hexdigest()}

    def _batches(self) -> Iterator[pa.Table]:
        for batch in read_batches(self._file, RAW):
            yield pa.Table.from_batches([batch], RAW)


def _chunks(parts: Iterable[tuple[Part, Iterable[Row]]]) -> Iterator[Chunk]:
    for part, rows in parts:
        some: list[Row] = []
        size = 0
        for row in rows:
            length, depth = _extent(row.value)
            if depth > MAX_DEPTH:
                advice = f"JSON nested deeper than {MAX_DEPTH} levels is not a conversation"
                row = replace(row, value=Flaw(MALFORMED, "record", show(row.value), advice))
            some.append(row)
            size += length
            if len(some) == ROWS_PER_CHUNK or size > CHARACTERS_PER_CHUNK:
                yield Chunk(part, some)
                some, size = [], 0
        if some:
            yield Chunk(part, some)


def _extent(value: Any) -> tuple[int, int]:
    """Return the number of characters in the texts of a row, and the depth of its nested values."""
    waiting, length, depth = [(value, 1)], 0, 0
    while waiting:
        inner, level = waiting.pop()
        depth = max(depth, level)
        if isinstance(inner, str | bytes):
            length += len(inner)
        elif isinstance(inner, Mapping):
            waiting += [(item, level + 1) for item in inner.values()]
        elif isinstance(inner, list):
            waiting += [(item, level + 1) for item in inner]
    return length, depth


def _system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content, "extra": "", "train": True}


class Identities:
    """The ids of records: the source's id for the first record that has it, else one made from the content.

    Such an id has 16 hex digits of the content's sha256. Among equal contents (duplicates=keep), the second
    record gets the suffix -1, the third -2, ...
    """

    def __init__(self, pool: Pool, stays: NDArray[np.bool_]) -> None:
        kept = np.flatnonzero(stays)
        identity, content = pool["identity"][kept], pool["content"][kept]
        self._own = np.zeros(len(pool), bool)
        self._own[kept] = (identity != 0) & (ordinals(identity) == 0)
        self._ordinal = np.zeros(len(pool), np.int64)
        self._ordinal[kept] = ordinals(content)
        self._content: Digests = pool["content"]

    def of(self, own: list[str], indices: NDArray[np.int64]) -> list[str]:
        return [
            name if self._own[index] else self._made(index)
            for name, index in zip(own, indices, strict=True)
        ]

    def _made(self, index: int) -> str:
        again = self._ordinal[index]
        return f"{self._content[index]:016x}" + (f"-{again}" if again else "")
