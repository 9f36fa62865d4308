"""Read the text of a file: find its encoding, read it line by line, and limit the size of records."""

import codecs
import io
import logging
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

from capas.core.errors import CapasError
from capas.dataset.files import File
from capas.dataset.streams import BUFFER_BYTES

log = logging.getLogger("capas")
# A byte that is not UTF-8 becomes a lone surrogate, later reported as a flaw with record, field and value.
LENIENT = "surrogateescape"
UTF8, CP1252 = "utf-8", "cp1252"
_MARKS = {  # the longest first, because UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NOT_CP1252 = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook; save its table as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save its table as CSV",
    b"\x1f\x8b": "compressed with gzip; add .gz to its name",
    b"(\xb5/\xfd": "compressed with zstd; add .zst to its name",
    b"PAR1": "parquet; name it .parquet and set dataset.path=parquet",
}


@dataclass(frozen=True)
class Reading:
    """The settings of `dataset.reading`, for reading files; those that are None are detected."""

    encoding: str | None
    separator: str | None
    quote: str | None
    escape: str | None
    records: str | None
    documents: str
    max_characters: int | None
    max_record_characters: int


@contextmanager
def open_text(file: File, reading: Reading, is_table: bool) -> Iterator[TextIO]:
    """Open a file and yield its decoded content, with line ends unchanged.

    Args:
        is_table: whether Excel writes files of this format, which are not always UTF-8.

    Raises:
        CapasError: the file is not text, or not in the encoding that is set or found.
    """
    encoding = reading.encoding or _find_encoding(file, is_table)
    if encoding not in (UTF8, "utf-8-sig"):
        file.read_as["encoding"] = encoding
    with file.open() as content:
        try:
            text = io.TextIOWrapper(content, encoding, LENIENT, newline="")
            yield text
            text.detach()
        except UnicodeError as error:
            raise CapasError(
                f"{file.name} cannot be read as {encoding}: {error}. Set dataset.reading.encoding "
                "(utf-8, utf-16, cp1252, ...)"
            ) from None
        except LookupError:
            raise CapasError(
                f"dataset.reading.encoding={encoding} is not a Python encoding (utf-8, utf-16, "
                "cp1252, latin-1, ...)"
            ) from None


def _find_encoding(file: File, is_table: bool) -> str:
    """Return the encoding of a file: by its byte order mark, or UTF-16 by its zero bytes; else UTF-8.

    A table whose non-ASCII characters are all invalid in UTF-8 is cp1252, as Excel writes it.

    Raises:
        CapasError: the file is an archive, a workbook or parquet.
    """
    with file.open() as content:
        start: bytes = content.peek(1024)[:1024]  # type: ignore[attr-defined]
        for mark, what in _OTHERS.items():
            if start.startswith(mark):
                raise CapasError(f"{file.name} is {what}")
        marked = [encoding for mark, encoding in _MARKS.items() if start.startswith(mark)]
        if marked:
            return marked[0]
        if start.count(0) > len(start) // 4:  # every other byte of Latin text in UTF-16 is zero
            return "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"
        if not is_table or not _is_cp1252(content):
            return UTF8
    log.warning(
        "%s is not UTF-8: read as %s (Windows, Excel). If this is wrong, set "
        "dataset.reading.encoding",
        *(file.name, CP1252),
    )
    return CP1252


def _is_cp1252(content: BinaryIO) -> bool:
    """Return whether the content has bytes beyond ASCII, all of them invalid in UTF-8 and valid in cp1252."""
    decoder = codecs.getincrementaldecoder(UTF8)(LENIENT)
    invalid = False
    while True:
        chunk = content.read(BUFFER_BYTES)
        text = decoder.decode(chunk, not chunk)
        if not text.isascii():
            if _NOT_CP1252.search(chunk) or re.search("[\x80-\ud7ff\ue000-\U0010ffff]", text):
                return False
            invalid = True
        if not chunk:
            return invalid


class Lines:
    """The lines of a text with their ends kept; `peek` looks ahead.

    `number` counts the lines returned. Call `begin` before each record: no record may be longer than
    `max_characters`, so that a compressed file cannot fill the memory.

    Raises:
        CapasError: a record is too long.
    """

    def __init__(self, text: TextIO, name: str, max_characters: int) -> None:
        self._text, self._name, self._max = text, name, max_characters
        self._ahead: deque[str] = deque()
        self.number, self.last = 0, ""
        self._first, self._size = 1, 0

    def peek(self, count: int, num_characters: int) -> list[str]:
        """Return the next lines without consuming them: at most `count`, of about `num_characters` in all."""
        while len(self._ahead) < count and sum(map(len, self._ahead)) < num_characters:
            line = self._read(self.number + len(self._ahead) + 1)
            if not line:
                break
            self._ahead.append(line)
        return list(self._ahead)

    def begin(self) -> None:
        self._first, self._size = self.number + 1, 0

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._read(self._first)
        if not line:
            raise StopIteration
        self.number += 1
        self._size += len(line)
        if self._size > self._max:
            self._refuse(self._first)
        self.last = line
        return line

    def _read(self, number: int) -> str:
        line = self._text.readline(self._max + 1)
        if len(line) > self._max:
            self._refuse(number)
        return line

    def _refuse(self, number: int) -> None:
        raise CapasError(too_large(f"{self._name}, line {number}", self._max))


def too_large(where: str, max_characters: int) -> str:
    return (
        f"{where}: the record that begins here is longer than "
        f"dataset.reading.max_record_characters={max_characters}. Look for an unclosed quote or a "
        "wrong file format; otherwise raise the limit"
    )


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number of the first line, text) of each paragraph, including the blank lines after it."""
    start, paragraph, blank = 1, "", False
    for number, line in enumerate(_lines_of(text), 1):
        if blank and not line.isspace():
            yield start, paragraph
            start, paragraph = number, ""
        paragraph += line
        blank = line.isspace()
    if paragraph:
        yield start, paragraph


def _lines_of(text: str) -> list[Any]:
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)


def cut(text: str, max_characters: int) -> Iterator[tuple[int, str]]:
    """Yield (number of the first line, text) of pieces, cut between paragraphs.

    A piece has at most `max_characters`, unless it is a single longer paragraph.
    """
    start, piece = 1, ""
    for number, paragraph in paragraphs(text):
        if piece and len(piece) + len(paragraph.rstrip()) > max_characters:
            yield start, piece
            start, piece = number, ""
        piece += paragraph
    if piece:
        yield start, piece
