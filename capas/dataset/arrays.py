"""JSON files that are larger than memory: an array of objects, or objects one after the other."""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from capas.core.errors import CapasError
from capas.dataset.flaws import show
from capas.dataset.shapes import recognises
from capas.dataset.text import Reading, too_large

_CHUNK_CHARS = 2**20
_BETWEEN = re.compile(r"[\s,]*")
_WHITE = re.compile(r"\s*")


def read_objects(content: TextIO, name: str, reading: Reading) -> Iterator[Any]:
    """An array of objects, objects one after the other, or the array that one object holds under a key.

    Args:
        reading: its `records` is that key, which must be stated where the object is too large or holds
            several such arrays; a.b is the key b in the object under a.

    Raises:
        CapasError: the content is no JSON of these forms.
    """
    text = _Text(content, reading.max_record_characters)
    text.skip_white()
    if text.ends:
        raise CapasError(f"{name} is empty")
    if reading.records is not None:
        text.enter(reading.records, name)
        yield from _array(text, name)
        return
    if text.at("["):
        yield from _array(text, name)
        text.skip_white()
        if not text.ends:
            raise CapasError(f"{name} has text after the end of its array: {show(text.ahead(40))}")
        return
    first = text.decode(f"{name}, record 1")
    text.skip_separators()
    if text.ends:
        yield from _held(first, name)
        return
    yield first
    for number in range(2, sys.maxsize):
        if text.ends:
            return
        yield text.decode(f"{name}, record {number}")
        text.skip_separators()


def _array(text: "_Text", name: str) -> Iterator[Any]:
    text.position += 1
    for number in range(1, sys.maxsize):
        text.skip_separators()
        if text.ends:
            raise CapasError(
                f"{name} is truncated: it ends inside its array, after record {number - 1}. "
                "Download it again"
            )
        if text.at("]"):
            text.position += 1
            return
        yield text.decode(f"{name}, record {number}")


def _held(value: Any, name: str) -> list[Any]:
    """The records of a file that is one value: those under its only key with a list of objects, or itself."""
    if not isinstance(value, dict) or recognises(value):
        return [value]
    lists = dict(_lists(value, ""))
    if len(lists) > 1:
        keys = ", ".join(f"{key} ({len(records)})" for key, records in lists.items())
        raise CapasError(
            f"{name} is one object with several lists of objects: {keys}. Name the list of records "
            f"in dataset.reading.records, e.g. {next(iter(lists))}"
        )
    return next(iter(lists.values()), [value])


def _lists(value: dict[str, Any], above: str) -> Iterator[tuple[str, list[Any]]]:
    for key, item in value.items():
        if isinstance(item, list) and item and all(isinstance(i, dict) for i in item):
            yield above + key, item
        elif isinstance(item, dict) and not recognises(item):
            yield from _lists(item, f"{above}{key}.")


class _Text:
    """A window on a text that is too large for memory."""

    def __init__(self, content: TextIO, max_characters: int) -> None:
        self._reader, self._max = content, max_characters
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
        self._skip(_WHITE)

    def skip_separators(self) -> None:
        self._skip(_BETWEEN)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        while True:
            self.position = pattern.match(self.buffer, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.buffer) or self._complete:
                return
            self.more()

    def at(self, character: str) -> bool:
        return self.buffer.startswith(character, self.position)

    def ahead(self, count: int) -> str:
        return self.buffer[self.position : self.position + count]

    def enter(self, key: str, name: str) -> None:
        """Go to the array under a key of the object that begins here."""
        for part in key.split("."):
            known: list[str] = []
            found = False
            self._take("{", key, name)
            while not found:
                self.skip_separators()
                if self.ends or self.at("}"):
                    raise CapasError(
                        f"{name}: there is no key {part!r} (dataset.reading.records={key}); there are "
                        f"{', '.join(known) or 'none'}"
                    )
                known.append(self.decode(f"{name}, key {len(known) + 1}"))
                found = known[-1] == part
                self._take(":", key, name)
                if not found:
                    self.decode(f"{name}, {known[-1]}")
        if not self.at("["):
            raise CapasError(
                f"{name}: dataset.reading.records={key} is no list: {show(self.ahead(40))}"
            )

    def _take(self, character: str, key: str, name: str) -> None:
        self.skip_white()
        if not self.at(character):
            raise CapasError(
                f"{name}: expected {character!r} on the way to dataset.reading.records={key}, found "
                f"{show(self.ahead(40))}"
            )
        self.position += 1
        self.skip_white()

    def decode(self, where: str) -> Any:
        """The next value; what is broken in an array has no end, so that nothing behind it can be read."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.buffer, self.position)
            except (ValueError, RecursionError) as error:
                if not self._complete and not isinstance(error, RecursionError):
                    if len(self.buffer) - self.position > self._max:
                        raise CapasError(
                            f"{too_large(where, self._max)}. If the records are in a list under a "
                            "key, set dataset.reading.records to that key"
                        ) from None
                    self.more()
                    continue
                near = show(self.buffer[self.position : self.position + 60])
                raise CapasError(
                    f"{where} is not JSON: {reason(error)} of the record, which begins with {near}. "
                    "Fix the file: the records after it cannot be read"
                ) from None
            if end < len(self.buffer) or self._complete:
                self.position = end
                return value
            self.more()


def reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
