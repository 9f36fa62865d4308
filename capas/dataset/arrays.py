"""Read JSON files larger than memory: an array of objects, or objects one after the other."""

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
    """Yield the objects of a file: of an array, one after the other, or of an array under a key.

    Args:
        reading: `records` is that key; a.b is the key b in the object under a. It must be set if the file's
            one object is too large or has several such arrays.

    Raises:
        CapasError: the content is not JSON of one of these forms, or a record is too large.
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
    """Return the records of a file with one value: the only list of objects in it, or the value itself."""
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
    """A window onto a text that may be larger than memory."""

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
        """Go to the array under a key of the object that begins here.

        Raises:
            CapasError: there is no such key, or its value is not a list.
        """
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
        """Return the next value.

        Raises:
            CapasError: the value is too large, or not JSON, so that the start of the next one is unknown.
        """
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
