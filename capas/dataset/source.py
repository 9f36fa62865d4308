"""Read the sources of records as configured in conf/: files, or data sets on the Hub."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.dataset.files import DataFiles, File, by_split, expand, is_url, url_revision
from capas.dataset.readers import read_rows
from capas.dataset.rows import Row, without_nulls_of_others
from capas.dataset.shapes import SIGNS, check_columns, needed_columns, recognises
from capas.dataset.text import Reading
from capas.dataset.trees import threads

log = logging.getLogger("capas")
FIRST_ROWS = 100  # a needed column must occur at least once in these rows
FORMATS = ("json", "csv", "parquet", "text")
KEYS = (
    *("path", "name", "revision", "split", "data_files"),
    *("shape", "columns", "roles", "system", "weight", "licence"),
)


@dataclass
class Source:
    """The source of `dataset`, or an entry of `dataset.mix`; `key` names it in error messages."""

    path: str
    name: str | None
    revision: str | None
    split: str | Mapping[str, str] | None
    data_files: DataFiles | None
    shape: str
    columns: Mapping[str, str | list[str]] | None
    roles: Mapping[str, str] | None
    system: str | None
    weight: float | None
    licence: str
    root: Path
    key: str
    reading: Reading
    files: list[File] = field(default_factory=list)
    unread_of_hub: Counter[str] = field(default_factory=Counter)

    @property
    def shape_of_rows(self) -> str:
        """The shape of the rows that `splits` yields, where trees have become conversations."""
        return "messages" if self.shape == "oasst" else self.shape

    def splits(self) -> Iterator[tuple[str, Iterator[Row]]]:
        """Yield (split, its rows) for each split that the source provides.

        Raises:
            CapasError: a file or the data set cannot be read, or its content is not the pinned revision.
        """
        given = self._of_files() if self.path in FORMATS else self._of_hub()
        for split, rows in given:
            yield split, self._threaded(rows)

    def _of_files(self) -> Iterator[tuple[str, Iterator[Row]]]:
        assert self.data_files is not None  # a rule of capas.config.schema
        self._check_pin()
        for split, patterns in by_split(self.data_files).items():
            files = expand(patterns, self.path, self.root)
            self.files += files
            yield split, itertools.chain.from_iterable(self._rows_of(file) for file in files)

    def _rows_of(self, file: File) -> Iterator[Row]:
        """Yield the rows of a file, after checking its columns, or those of the first rows."""
        if file.suffix == ".parquet":
            yield from read_rows(file, self.reading, lambda there: self._needed(there, file.name))
            return
        yield from self._checked(read_rows(file, self.reading), file.name)
        if file.num_cut:
            log.info(
                "%s: %d texts longer than dataset.reading.max_characters=%d split into %d "
                "records at paragraphs",
                *(file.name, file.num_cut, self.reading.max_characters, file.num_pieces),
            )

    def _needed(self, there: list[str], where: str) -> list[str]:
        check_columns(there, self.shape, self.columns or {}, self.key, where)
        return needed_columns(there, self.shape, self.columns or {})

    def _checked(self, rows: Iterator[Row], where: str) -> Iterator[Row]:
        """Yield the same rows, after checking that the needed columns occur in the first ones.

        Raises:
            CapasError: a needed column is missing.
        """
        first = list(itertools.islice(rows, FIRST_ROWS))
        values = [row.value for row in first if isinstance(row.value, Mapping)]
        recognised = self.shape == "auto" and any(recognises(value) for value in values)
        if values and not recognised:
            there = dict.fromkeys(str(name) for value in values for name in value)
            check_columns(there, self.shape, self.columns or {}, self.key, where)
        yield from first
        yield from rows

    def _check_pin(self) -> None:
        """Check that the content behind URLs has the pinned `revision`; DVC itself notices edits in data/own.

        Raises:
            CapasError: it has another revision.
        """
        assert self.data_files is not None
        names = [name for patterns in by_split(self.data_files).values() for name in patterns]
        found = url_revision(self.data_files) if any(map(is_url, names)) else None
        if found != self.revision:
            raise CapasError(
                f"{self.key}.revision={self.revision or 'null'}, but the content of "
                f"{', '.join(names)} has the revision {found or 'null'} (URLs are pinned by "
                "content; files in data/own are not pinned). To use the current content, set "
                f"revision: {found or 'null'}"
            )

    def _of_hub(self) -> Iterator[tuple[str, Iterator[Row]]]:
        given = self.split if isinstance(self.split, Mapping) else {"train": self.split}
        for split, theirs in given.items():
            yield split, self._hub_rows(str(theirs))

    def _hub_rows(self, theirs: str) -> Iterator[Row]:
        from capas.dataset.hub import read_split

        where = f"{self.path} ({theirs})"
        rows = read_split(
            *(self.path, self.name, self.revision, theirs, self.key),
            needed=lambda there: self._needed(there, where),
            unread=self.unread_of_hub,
        )
        found = (
            Row(where, "record", number, without_nulls_of_others(value))
            for number, value in enumerate(rows, 1)
        )
        yield from self._checked(found, where)

    def _threaded(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Return the rows, with trees of messages turned into conversations if the rows are messages."""
        first = next(rows, None)
        if first is None:
            return iter(())
        rows = itertools.chain([first], rows)
        found = isinstance(first.value, Mapping) and {*SIGNS["oasst"]} <= set(first.value)
        return threads(rows) if self.shape == "oasst" or (self.shape == "auto" and found) else rows

    def unread(self) -> dict[str, int]:
        """Return {column that was not read: number of its rows}."""
        counts = Counter(self.unread_of_hub)
        for file in self.files:
            counts.update(file.unread)
        return dict(counts)

    def facts(self) -> dict[str, Any]:
        """Return the source's facts for source.json."""
        shown = {
            key: getattr(self, key) for key in ("path", "name", "revision", "licence", "weight")
        }
        return {**shown, "files": [file.facts() for file in self.files]}


def sources_of(dataset: Params, root: Path) -> list[Source]:
    """Return the source of `dataset` itself, and those of its mix."""
    own: dict[str, Any] = {key: dataset[key] for key in KEYS}
    keys = ["dataset", *(f"dataset.mix[{i}]" for i in range(len(dataset.mix)))]
    entries = zip((own, *dataset.mix), keys, strict=True)
    reading = Reading(**dataset.reading)
    return [Source(**entry, root=root, key=key, reading=reading) for entry, key in entries]
