"""The rows of a file, one after the other, each with the place where it stands.

Own readers: Arrow, and so `datasets`, gives every struct the keys of all rows (a tool call's arguments get
those of other calls), and its errors name no line.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from capas.dataset.arrays import LENIENT, read_objects, reason
from capas.dataset.files import File
from capas.dataset.flaws import BAD_JSON, BAD_ROW, Flaw, printable, show
from capas.errors import CapasError

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Row:
    """`value` is a Flaw where the row cannot be read; `unit` is line, or record where lines do not count."""

    file: str
    unit: str
    number: int
    value: Any

    @property
    def place(self) -> dict[str, str]:
        return {"file": self.file, "at": f"{self.unit} {self.number}"}


def read_rows(file: File) -> Iterator[Row]:
    """Every row of the file: a mapping (or whatever stands there in JSON), read as it is needed.

    Raises:
        CapasError: the file as a whole cannot be read.
    """
    if file.suffix == ".parquet":
        with file.open_seekable() as content:
            yield from _parquet(content, file.name)
    else:
        with file.open() as content:
            yield from _READERS[file.suffix](content, file.name)


def _json_lines(content: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(content, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", LENIENT)
        if not text.isspace():
            yield Row(name, "line", number, _parsed(text))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        near = (
            text[error.pos : error.pos + 40]
            if isinstance(error, json.JSONDecodeError)
            else text[:40]
        )
        return Flaw(BAD_JSON, "", near.rstrip("\n"), f"the line is not JSON: {reason(error)}")


def _json(content: BinaryIO, name: str) -> Iterator[Row]:
    for number, value in enumerate(read_objects(content, name), 1):
        yield Row(name, "record", number, value)


def _csv(content: BinaryIO, name: str) -> Iterator[Row]:
    """The first line names the columns. Where it has ; and no , that separates (as in Spain)."""
    lines = _Lines(content)
    first = lines.peek()
    comma = ";" if ";" in first and "," not in first else ","
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter="\t" if ".tsv" in name.lower() else comma, strict=True)
    header = _header(reader, name)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            flaw = Flaw(BAD_ROW, "", lines.last.rstrip("\r\n"), f"the row is not CSV: {error}")
            yield Row(name, "line", start, flaw)
            continue
        if cells:
            yield Row(name, "line", start, _row(header, cells))


class _Lines:
    """The decoded lines, line ends kept, with a look at the first and the last."""

    def __init__(self, content: BinaryIO) -> None:
        self._content, self.last = content, ""
        self._first: str | None = content.readline().decode("utf-8-sig", LENIENT)

    def peek(self) -> str:
        return self._first or ""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._first is not None:
            self.last, self._first = self._first, None
        else:
            self.last = self._content.readline().decode("utf-8", LENIENT)
        if not self.last:
            raise StopIteration
        return self.last


def _header(reader: Iterable[list[str]], name: str) -> list[str]:
    header = [cell.strip() for cell in next(iter(reader), [])]
    if not header:
        raise CapasError(f"{name} is empty; its first line must name the columns")
    if any(printable(column) != column for column in header):
        raise CapasError(f"{name}, line 1: {show(header)} is not UTF-8; save the file as UTF-8")
    twice = {column for column in header if header.count(column) > 1 or not column}
    if twice:
        raise CapasError(
            f"{name}, line 1: the columns must have names of their own; twice or empty: "
            f"{', '.join(sorted(map(repr, twice)))}"
        )
    return header


def _row(header: list[str], cells: list[str]) -> Any:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    text = f"{len(cells)} cells in a row of {len(header)} columns; quote what holds a comma"
    return Flaw(BAD_ROW, "", cells, text)


def _text(content: BinaryIO, name: str) -> Iterator[Row]:
    """Documents with empty lines between them; the line ends within one are kept."""
    document: list[str] = []
    start = 1
    for number, line in enumerate(_Lines(content), 1):
        if line.isspace() and document:
            yield _document(name, start, document)
            document = []
        elif not line.isspace():
            start = start if document else number
            document.append(line)
    if document:
        yield _document(name, start, document)


def _document(name: str, start: int, lines: list[str]) -> Row:
    return Row(name, "line", start, {"text": "".join(lines).rstrip("\r\n")})


def _parquet(content: BinaryIO, name: str) -> Iterator[Row]:
    number = 0
    with pq.ParquetFile(content) as parquet:
        for batch in parquet.iter_batches(_ROWS_AT_ONCE):
            for value in batch.to_pylist():
                number += 1
                yield Row(name, "record", number, without_nulls_of_others(value))


def without_nulls_of_others(row: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives each struct the keys of all rows: within a column, those that are null are of others."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
}
