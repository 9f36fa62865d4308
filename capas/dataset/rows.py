"""The rows of a file, one after the other, each with the place where it stands.

Own readers: Arrow, and so `datasets`, gives every struct the keys of all rows (a tool call's arguments get
those of other calls), and its errors name no line.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from capas.dataset.files import File
from capas.dataset.flaws import MALFORMED, Flaw, show
from capas.errors import CapasError

_CHUNK_CHARS = 2**20
_ROWS_AT_ONCE = 1000
_BETWEEN = re.compile(r"[\s,]*")
# A byte that is no UTF-8 becomes a lone surrogate, and with it a flaw of its record, field and value named.
_LENIENT = "surrogateescape"


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
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", _LENIENT)
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
        return Flaw(MALFORMED, "", near.rstrip("\n"), f"the line is not JSON: {_of_json(error)}")


def _of_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json(content: BinaryIO, name: str) -> Iterator[Row]:
    """An array of objects, or objects one after the other, decoded while it is read."""
    text = _Text(content)
    text.skip_white()
    if text.ends:
        raise CapasError(f"{name} is empty")
    array = text.buffer.startswith("[", text.position)
    text.position += array
    for number in range(1, sys.maxsize):
        text.skip_separators()
        if text.ends or (array and text.buffer[text.position] == "]"):
            break
        yield Row(name, "record", number, text.decode(f"{name}, record {number}"))
    if array and text.ends:
        raise CapasError(
            f"{name} ends within its array, after record {number - 1}: it is cut off; get it again"
        )
    text.position += array
    text.skip_white()
    if not text.ends:
        raise CapasError(
            f"{name} goes on after its array: {show(text.buffer[text.position :][:40])}"
        )


class _Text:
    """A window on a text that is too large for memory."""

    def __init__(self, content: BinaryIO) -> None:
        self._reader = codecs.getreader("utf-8-sig")(content, _LENIENT)
        self._decoder = json.JSONDecoder()
        self.buffer, self.position, self._complete = "", 0, False

    @property
    def ends(self) -> bool:
        return self._complete and self.position >= len(self.buffer)

    def more(self) -> None:
        kept = self.buffer[self.position :]
        added = self._reader.read(max(_CHUNK_CHARS, len(kept)))
        self.buffer, self.position, self._complete = kept + added, 0, not added

    def skip_white(self) -> None:
        self._skip(re.compile(r"\s*"))

    def skip_separators(self) -> None:
        self._skip(_BETWEEN)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        while True:
            self.position = pattern.match(self.buffer, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.buffer) or self._complete:
                return
            self.more()

    def decode(self, where: str) -> Any:
        """The next value; what is broken in an array has no end, so that nothing behind it can be read."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.buffer, self.position)
            except (ValueError, RecursionError) as error:
                if not self._complete and not isinstance(error, RecursionError):
                    self.more()
                    continue
                near = show(self.buffer[self.position : self.position + 60])
                raise CapasError(
                    f"{where} is not JSON: {_of_json(error)} of it; it begins with {near}. Mend the file: "
                    "what stands behind it cannot be found"
                ) from None
            if end < len(self.buffer) or self._complete:
                self.position = end
                return value
            self.more()


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
            flaw = Flaw(MALFORMED, "", lines.last.rstrip("\r\n"), f"the row is not CSV: {error}")
            yield Row(name, "line", start, flaw)
            continue
        if cells:
            yield Row(name, "line", start, _row(header, cells))


class _Lines:
    """The decoded lines, line ends kept, with a look at the first and the last."""

    def __init__(self, content: BinaryIO) -> None:
        self._content, self.last = content, ""
        self._first: str | None = content.readline().decode("utf-8-sig", _LENIENT)

    def peek(self) -> str:
        return self._first or ""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._first is not None:
            self.last, self._first = self._first, None
        else:
            self.last = self._content.readline().decode("utf-8", _LENIENT)
        if not self.last:
            raise StopIteration
        return self.last


def _header(reader: Iterable[list[str]], name: str) -> list[str]:
    header = [cell.strip() for cell in next(iter(reader), [])]
    if not header:
        raise CapasError(f"{name} is empty; its first line must name the columns")
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
    return Flaw(MALFORMED, "", cells, text)


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
