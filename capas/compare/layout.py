"""Lay out plain text in columns: long texts lose their middle, and no line exceeds the terminal's width."""

import shutil
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

MIN_WIDTH, WIDTH, MAX_WIDTH = 40, 80, 120
GAP = 2  # blanks between columns
CUT = "…"
NEWLINE = "↵"
_CONTEXT = 12  # characters shown before and after the part that differs
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def terminal_width() -> int:
    """Return the terminal's width in columns, or $COLUMNS if it is set; 80 if neither is known."""
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def width_of(text: str) -> int:
    """Return how many columns `text` takes in a terminal; a Chinese character takes two."""
    return sum(map(_width, text))


def printable(text: str) -> str:
    """Return `text` with � for control characters and direction marks; newlines stay."""
    blank = {"\t": " ", "\r": "", "\n": "\n"}
    return "".join(
        blank[c] if c in blank else "�" if c in _DIRECTIONS or _steers(c) else c for c in text
    )


def one_line(text: str) -> str:
    """Return `text` as one printable line, ↵ for each newline."""
    return printable(text.strip("\n")).replace("\n", NEWLINE)


def shortened(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, without its middle if it is longer."""
    if width_of(text) <= width:
        return text
    room = width - 1
    head = _fitting(text, (room + 1) // 2)
    tail = _fitting(text[::-1], room - width_of(head))[::-1]
    return f"{head}{CUT}{tail}"


def padded(text: str, width: int, right: bool = False) -> str:
    """Return `text` padded with blanks to `width` columns, on its left side if `right` is true."""
    blanks = " " * (width - width_of(text))
    return blanks + text if right else text + blanks


def wrapped(text: str, width: int, max_lines: int | None = None) -> list[str]:
    """Break `text` into lines of `width` columns, at blanks if possible.

    If there would be more than `max_lines`, the middle of the text is left out.
    """
    lines = _broken(text, width)
    if max_lines is None or len(lines) <= max_lines:
        return lines
    flat, room = one_line(text), width * max_lines
    while len(lines) > max_lines:
        lines = _broken(shortened(flat, room), width)
        room -= 1
    return lines


def beside(left: Sequence[str], right: Sequence[str], width: int) -> list[str]:
    """Join two blocks of lines, the left one in `width` columns."""
    joined = zip_longest(left, right, fillvalue="")
    return [f"{padded(one, width + GAP)}{other}".rstrip() for one, other in joined]


def focused(texts: Sequence[str], room: int) -> list[str]:
    """Cut the common beginning and end of texts, if one of them is longer than `room` columns.

    A difference late in long texts then stays visible.
    """
    if all(width_of(text) <= room for text in texts) or len(set(texts)) == 1:
        return list(texts)
    begin = max(0, _num_common(texts) - _CONTEXT)
    rest = [text[begin:] for text in texts]
    same_end = _num_common([text[::-1] for text in rest])
    end = max(0, same_end - _CONTEXT)
    kept = [text[: len(text) - end] for text in rest]
    return [f"{CUT if begin else ''}{text}{CUT if end else ''}" for text in kept]


def table(rows: Sequence[Sequence[str]], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    """Return a line for each row, its cells shortened to `widths`."""
    gap = " " * GAP
    return [
        gap.join(
            padded(shortened(cell, width), width, to_right)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _last_blank(text: str, end: int) -> int:
    """Return the index of the last blank up to `end` that may end a line (no % follows); -1 without one."""
    blanks = (i for i in range(end, -1, -1) if text[i] == " " and text[i + 1 : i + 2] != "%")
    return next(blanks, -1)


def _num_common(texts: Sequence[str]) -> int:
    """Return how many leading characters all texts share."""
    columns = enumerate(zip(*texts, strict=False))
    shortest = min(map(len, texts))
    return next((i for i, column in columns if len(set(column)) > 1), shortest)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs")


def _fitting(text: str, room: int) -> str:
    """Return the beginning of `text` that takes at most `room` columns."""
    taken = 0
    for index, character in enumerate(text):
        taken += _width(character)
        if taken > room:
            return text[:index]
    return text


def _broken(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in text.split("\n"):
        rest = line
        while width_of(rest) > width:
            piece = _fitting(rest, width)
            blank = _last_blank(rest, len(piece))
            piece = piece[:blank] if blank > len(piece) // 3 else piece
            lines.append(piece.rstrip())
            rest = rest[len(piece) :].lstrip()
        lines.append(rest)
    return lines
