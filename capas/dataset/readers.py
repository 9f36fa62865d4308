"""Read the rows of a file of any format, one after the other, each with its place.

The readers are capas' own, because Arrow, and so `datasets`, gives every struct the keys of all rows (a tool
call's arguments get those of other calls), and Arrow's errors name no line.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from capas.core.errors import CapasError
from capas.dataset.arrays import read_objects, reason
from capas.dataset.cells import Needed, read_parquet
from capas.dataset.delimited import read_table
from capas.dataset.files import File
from capas.dataset.flaws import BAD_JSON, Flaw
from capas.dataset.rows import Row
from capas.dataset.text import Lines, Reading, cut, open_text, too_large

FILE, BLANK_LINES = "file", "blank_lines"  # documents of a text file: whole files, or blocks


def read_rows(file: File, reading: Reading, needed: Needed | None = None) -> Iterator[Row]:
    """Yield every row of the file, read on demand: a mapping, or any value in a JSON file.

    Args:
        needed: for a parquet file, a function from its columns to those to read.

    Raises:
        CapasError: the file as a whole cannot be read.
    """
    if file.suffix == ".parquet":
        with file.open_seekable() as content:
            yield from read_parquet(content, file, reading, needed)
    else:
        read, is_table = _READERS[file.suffix]
        with open_text(file, reading, is_table) as text:
            yield from read(text, file, reading)


def _json_lines(text: TextIO, file: File, reading: Reading) -> Iterator[Row]:
    lines = Lines(text, file.name, reading.max_record_characters)
    ahead = lines.peek(1, 1)
    if ahead and _begins_document(ahead[0]):  # named .jsonl, but one JSON document over many lines
        yield from _json(cast(TextIO, _After(ahead[0], text)), file, reading)
        return
    for line in lines:
        if not line.isspace():
            yield Row(file.name, "line", lines.number, _parsed(line))
        lines.begin()


def _begins_document(line: str) -> bool:
    """Return whether a value that begins in this line continues in the next ones, as in indented JSON."""
    if line.strip() in ("[", "{"):
        return True
    if not line.lstrip().startswith("["):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except RecursionError:
        return False  # one line, nested too deeply: a flaw of that line
    return False


class _After:
    """A text, preceded by a line that was already read from it."""

    def __init__(self, line: str, text: TextIO) -> None:
        self._line, self._text = line, text

    def read(self, size: int) -> str:
        line, self._line = self._line, ""
        return line + self._text.read(size)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        start = error.pos if isinstance(error, json.JSONDecodeError) else 0
        near = text[start : start + 40].rstrip("\r\n")
        return Flaw(BAD_JSON, "", near, f"the line is not JSON: {reason(error)}")


def _json(text: TextIO, file: File, reading: Reading) -> Iterator[Row]:
    for number, value in enumerate(read_objects(text, file.name, reading), 1):
        yield Row(file.name, "record", number, value)


def _texts(text: TextIO, file: File, reading: Reading) -> Iterator[Row]:
    """Yield documents, the whole file or blocks between blank lines; long ones are cut if so configured."""
    documents = _blank_lines if reading.documents == BLANK_LINES else _whole
    for start, document in documents(text, file, reading):
        pieces = [(1, document)]
        if reading.max_characters is not None and len(document) > reading.max_characters:
            pieces = list(cut(document, reading.max_characters))
            file.num_cut, file.num_pieces = file.num_cut + 1, file.num_pieces + len(pieces)
        for first, piece in pieces:
            row = {"text": piece.rstrip("\r\n")}
            yield Row(file.name, "line", start + first - 1, row)


def _whole(text: TextIO, file: File, reading: Reading) -> Iterator[tuple[int, str]]:
    document = text.read(reading.max_record_characters + 1)
    if len(document) > reading.max_record_characters:
        raise CapasError(
            too_large(f"{file.name}, line 1", reading.max_record_characters)
            + f", or set dataset.reading.documents={BLANK_LINES}: blank lines then separate the "
            "documents"
        )
    yield 1, document


def _blank_lines(text: TextIO, file: File, reading: Reading) -> Iterator[tuple[int, str]]:
    lines = Lines(text, file.name, reading.max_record_characters)
    document: list[str] = []
    start = 1
    for line in lines:
        if not line.isspace():
            start = start if document else lines.number
            document.append(line)
            continue
        if document:
            yield start, "".join(document)
        document = []
        lines.begin()
    if document:
        yield start, "".join(document)


# For each suffix the reader, and whether Excel and Notepad write such files.
_READERS: dict[str, tuple[Callable[[TextIO, File, Reading], Iterator[Row]], bool]] = {
    ".json": (_json, False),
    ".jsonl": (_json_lines, False),
    ".ndjson": (_json_lines, False),
    ".csv": (read_table, True),
    ".tsv": (read_table, True),
    ".txt": (_texts, True),
}
