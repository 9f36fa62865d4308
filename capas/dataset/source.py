"""Where records come from: generated, from files, or from the Hub; each source as conf/ states it."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capas.dataset.files import DataFiles, File, by_split, expand, is_url, url_revision
from capas.dataset.rows import Row, read_rows, without_nulls_of_others
from capas.dataset.shapes import SIGNS
from capas.dataset.trees import threads
from capas.errors import CapasError
from capas.params import Params

FORMATS = ("json", "csv", "parquet", "text")
KEYS = (
    *("path", "name", "revision", "split", "data_files"),
    *("shape", "columns", "roles", "system", "weight", "licence"),
)


@dataclass
class Source:
    """The source of `dataset`, or an entry of `dataset.mix`; `key` says which, for messages."""

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
    files: list[File] = field(default_factory=list)

    @property
    def shape_of_rows(self) -> str:
        """Trees have become conversations by then."""
        return "messages" if self.shape == "oasst" else self.shape

    def splits(self) -> Iterator[tuple[str, Iterator[Row]]]:
        """(split, its rows) for each split that the source gives.

        Raises:
            CapasError: a file or the data set cannot be read, or has another content than its pin says.
        """
        given = self._of_files() if self.path in FORMATS else self._of_hub()
        for split, rows in given:
            yield split, self._threaded(rows)

    def _of_files(self) -> Iterator[tuple[str, Iterator[Row]]]:
        assert self.data_files is not None  # a rule of capas.config
        self._check_pin()
        for split, patterns in by_split(self.data_files).items():
            files = expand(patterns, self.path, self.root)
            self.files += files
            yield split, itertools.chain.from_iterable(read_rows(file) for file in files)

    def _check_pin(self) -> None:
        """DVC sees an edit in data/own; what a URL holds is pinned by `revision`."""
        assert self.data_files is not None
        names = [name for patterns in by_split(self.data_files).values() for name in patterns]
        found = url_revision(self.data_files) if any(map(is_url, names)) else None
        if found != self.revision:
            raise CapasError(
                f"{self.key}.revision={self.revision or 'null'}, but what {', '.join(names)} holds now has "
                f"the revision {found or 'null'} (a URL is pinned by its content; a file in data/own has "
                f"no pin). To use it as it is now, set revision: {found or 'null'}"
            )

    def _of_hub(self) -> Iterator[tuple[str, Iterator[Row]]]:
        given = self.split if isinstance(self.split, Mapping) else {"train": self.split}
        for split, theirs in given.items():
            yield split, self._hub_rows(str(theirs))

    def _hub_rows(self, theirs: str) -> Iterator[Row]:
        from capas.dataset.hub import read_split

        rows = read_split(self.path, self.name, self.revision, theirs, self.key)
        for number, value in enumerate(rows, 1):
            yield Row(f"{self.path} ({theirs})", "record", number, without_nulls_of_others(value))

    def _threaded(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Trees of messages as conversations, where the rows are messages."""
        first = next(rows, None)
        if first is None:
            return iter(())
        rows = itertools.chain([first], rows)
        found = isinstance(first.value, Mapping) and {*SIGNS["oasst"]} <= set(first.value)
        return threads(rows) if self.shape == "oasst" or (self.shape == "auto" and found) else rows

    def facts(self) -> dict[str, Any]:
        """What source.json says of it."""
        shown = {
            key: getattr(self, key) for key in ("path", "name", "revision", "licence", "weight")
        }
        return {**shown, "files": [file.facts() for file in self.files]}


def sources_of(dataset: Params, root: Path) -> list[Source]:
    """The source of `dataset` itself, and those of its mix."""
    own: dict[str, Any] = {key: dataset[key] for key in KEYS}
    keys = ["dataset", *(f"dataset.mix[{i}]" for i in range(len(dataset.mix)))]
    entries = zip((own, *dataset.mix), keys, strict=True)
    return [Source(**entry, root=root, key=key) for entry, key in entries]
