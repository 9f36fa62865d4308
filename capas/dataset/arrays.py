"""JSON files that are larger than memory: an array of objects, or objects one after the other."""

import codecs
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from capas.dataset.flaws import show
from capas.errors import CapasError

_CHUNK_CHARS = 2**20
_BETWEEN = re.compile(r"[\s,]*")
# A byte that is no UTF-8 becomes a lone surrogate, and with it a flaw of its record, field and value named.
LENIENT = "surrogateescape"


def read_objects(content: BinaryIO, name: str) -> Iterator[Any]:
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
        yield text.decode(f"{name}, record {number}")
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
        self._reader = codecs.getreader("utf-8-sig")(content, LENIENT)
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
                    f"{where} is not JSON: {reason(error)} of it; it begins with {near}. Mend the file: "
                    "what stands behind it cannot be found"
                ) from None
            if end < len(self.buffer) or self._complete:
                self.position = end
                return value
            self.more()


def reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
