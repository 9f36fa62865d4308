"""Inspect a data set without a model or a tokenizer: shapes, columns, flaws, copies, lengths."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from capas.core.params import Params
from capas.core.records import SPLITS
from capas.dataset.flaws import NUM_EXAMPLES, Flaws, location
from capas.dataset.generated import splits_of
from capas.dataset.pool import Numbers, Part
from capas.dataset.rows import Row
from capas.dataset.shapes import SIGNS, recognise, recognises
from capas.dataset.source import Source
from capas.dataset.splits import ordinals

log = logging.getLogger("capas")
UNKNOWN = "unknown"  # the shape of a row without a known shape
Parts = Iterator[tuple[Part, Iterator[Row]]]


@dataclass
class Found:
    """Counts and facts about the rows of one source.

    `shapes` and `columns` count rows, after trees of messages became conversations. `files` are the facts of
    source.json, with the encoding and separator found. `num_cut` texts were longer than
    dataset.reading.max_characters and became `num_pieces` records.
    """

    path: str
    stated_shape: str
    shapes: Counter[str] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    files: list[dict[str, Any]] = field(default_factory=list)
    num_cut: int = 0
    num_pieces: int = 0

    @property
    def why(self) -> str:
        """The reason why the rows are read in their shape, as text."""
        if self.stated_shape != "auto":
            return f"dataset.shape states {self.stated_shape}"
        return "; ".join(
            f"{count} records have the columns {', '.join(SIGNS[shape])} of {shape}"
            if shape in SIGNS
            else f"{count} records have the columns of no known shape"
            for shape, count in self.shapes.most_common()
        )


@dataclass(frozen=True)
class FlawsOfKind:
    """Flaws of one kind: the policy in `dataset.flaws`; examples with file, at, id, field, value and why."""

    count: int
    policy: str
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Copy:
    """An exact copy of a record: both places, like 'data/own/mine.csv, line 12'."""

    place: str
    first: str


@dataclass(frozen=True)
class Lengths:
    """Lengths of records in characters of their contents; `longest` is the place of the longest record."""

    shortest: int
    median: float
    percentile_95: float
    largest: int
    longest: str


@dataclass(frozen=True)
class Inspection:
    """The inspection of a data set.

    `num_valid` counts the valid records, `duplicates` all copies; `copies` has the first of these.
    """

    sources: list[Found]
    num_read: int
    num_valid: int
    flaws: dict[str, FlawsOfKind]
    repaired: dict[str, int]
    left_out: dict[str, int]
    duplicates: int
    copies: list[Copy]
    lengths: Lengths | None


class Watch:
    """A watcher that counts rows, source by source, while they are read."""

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources
        self.found = [Found(source.path, source.shape) for source in sources]

    def parts(self, parts: Parts) -> Parts:
        """Yield the same parts, and count their rows in `found`."""
        for part, rows in parts:
            yield part, self._rows(part, rows)
        for source, found in zip(self._sources, self.found, strict=True):
            found.files = [file.facts() for file in source.files]
            found.columns.update(source.unread())
            found.num_cut = sum(file.num_cut for file in source.files)
            found.num_pieces = sum(file.num_pieces for file in source.files)

    def _rows(self, part: Part, rows: Iterator[Row]) -> Iterator[Row]:
        found = self.found[part.source]
        for row in rows:
            found.splits[SPLITS[part.split]] += 1
            if isinstance(row.value, Mapping):
                found.columns.update(str(name) for name, v in row.value.items() if v is not None)
                found.shapes[_shape(part.shape, row.value)] += 1
            yield row


def _shape(stated: str, value: Mapping[str, Any]) -> str:
    if stated != "auto":
        return stated
    return recognise(value) if recognises(value) else UNKNOWN


def summarise(found: list[Found], flaws: Flaws, numbers: Numbers) -> Inspection:
    """Return the inspection of the records that were read; a record's flaw is not an error."""
    counts = flaws.dropped + flaws.refused
    copies = np.flatnonzero(ordinals(numbers["content"]) > 0)
    return Inspection(
        sources=found,
        num_read=flaws.num_read,
        num_valid=len(numbers),
        flaws={
            kind: FlawsOfKind(counts[kind], flaws.policy(kind), flaws.examples[kind])
            for kind in sorted(counts)
        },
        repaired=dict(sorted(flaws.repaired.items())),
        left_out=dict(sorted(flaws.left_out.items())),
        duplicates=len(copies),
        copies=[_copy(numbers, int(index)) for index in copies[:NUM_EXAMPLES]],
        lengths=_lengths(numbers) if len(numbers) else None,
    )


def _copy(numbers: Numbers, index: int) -> Copy:
    content = numbers["content"]
    first = int((content == content[index]).argmax())
    return Copy(location(numbers.where(index)), location(numbers.where(first)))


def _lengths(numbers: Numbers) -> Lengths:
    characters = numbers["characters"]
    longest = int(characters.argmax())
    return Lengths(
        shortest=int(characters.min()),
        median=float(np.median(characters)),
        percentile_95=float(np.percentile(characters, 95)),
        largest=int(characters[longest]),
        longest=location(numbers.where(longest)),
    )


def parts_of(sources: list[Source], dataset: Params, given: list[set[str]], flaws: Flaws) -> Parts:
    """Yield every split of every source, and its rows.

    Add the names of the splits to `given`, and the columns that were not read to `flaws`.
    """
    for number, source in enumerate(sources):
        for split, rows in splits_of(source, dataset):
            given[number].add(split)
            code, columns = SPLITS.index(split), source.columns or {}
            log.info("%s: reading %s", source.path, split)
            shape = source.shape_of_rows
            yield Part(number, code, shape, columns, source.system, source.roles), rows
        for column, count in source.unread().items():
            flaws.leave_out(column, count)
