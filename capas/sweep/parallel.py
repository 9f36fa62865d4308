"""Lay out the trials of a sweep as parallel coordinates, axes from top to bottom: a phone is narrow, not low.

The page's template draws the layout as SVG: a line for each trial, coloured by its score.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from capas.sweep.effects import MAX_LEVELS, is_logarithmic, is_spread, number_of
from capas.sweep.ranking import Row

WIDTH, MARGIN, TOP, DISTANCE = 440, 18, 30, 70  # in pixels of the drawing
_WIDTH_OF_A_LETTER = 6.6
_MOST_LETTERS = 18
_MOST_DIGITS = 9
Number = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """An axis, with its ticks (x, middle of the text, text); `title` says what it stands for."""

    title: str
    y: float
    ticks: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Line:
    """A trial: its points, the share of the way from the worst score to the best one, and what it is."""

    points: str
    share: float
    title: str
    is_first: bool


@dataclass(frozen=True)
class Parallel:
    """The whole drawing, the lines in the order in which they are drawn: the best on top."""

    height: float
    axes: tuple[Axis, ...]
    lines: tuple[Line, ...]


def parallel(
    rows: Sequence[Row], keys: Sequence[str], objective: str, maximize: bool, number: Number
) -> Parallel | None:
    """Return the layout; None for less than two rows, or without keys that differ."""
    if len(rows) < 2 or not keys:
        return None
    scales = [Scale.of([row.value(key) for row in rows], number) for key in keys]
    scores = [score for row in rows for score in row.values.values()]
    of_score = Scale.of_numbers(scores, number)
    ys = [TOP + DISTANCE * place for place in range(len(keys) + 1)]
    lines = []
    for row in rows:
        xs = [scale.x(row.value(key)) for scale, key in zip(scales, keys, strict=True)]
        values = [f"{key}={row.value(key)}" for key in keys]
        for replicate, score in row.values.items():
            end = of_score.at(score)
            points = " ".join(f"{x:.1f},{y}" for x, y in zip([*xs, end], ys, strict=True))
            share = (end - MARGIN) / (WIDTH - 2 * MARGIN)
            title = ", ".join([*values, *replicate, f"{objective} {number(score)}"])
            share = round(share if maximize else 1 - share, 3)
            lines.append(Line(points, share, title, row is rows[0]))
    titles, ticks = [*keys, objective], [*(scale.ticks for scale in scales), of_score.ticks]
    axes = (Axis(*axis) for axis in zip(titles, ys, map(thinned, ticks), strict=True))
    lines.sort(key=lambda line: (line.is_first, line.share))
    return Parallel(ys[-1] + 34, tuple(axes), tuple(lines))


@dataclass(frozen=True)
class Scale:
    """The places of values on an axis.

    Attributes:
        places: {value as given: number, or place among categories}.
        marks: {text of a tick: number or place}.
    """

    low: float
    high: float
    is_log: bool
    places: dict[str, float]
    marks: dict[str, float]

    @classmethod
    def of(cls, values: Sequence[str], number: Number) -> "Scale":
        """Return the scale of a key's values: numbers by size, others one beside the other."""
        texts = list(dict.fromkeys(values))
        numbers = {text: n for text in texts if (n := number_of(text)) is not None}
        if len(numbers) < len(texts):
            places = {text: float(place) for place, text in enumerate(sorted(texts))}
            return cls(0, len(texts) - 1, False, places, places)
        found = sorted(set(numbers.values()))
        is_log = is_logarithmic(found)
        marks = _three(found, is_log) if len(found) > MAX_LEVELS else found
        texts_of = {value: short_number(text, number) for text, value in numbers.items()}
        shown = {texts_of.get(mark, number(mark)): mark for mark in marks}
        return cls(found[0], found[-1], is_log, numbers, shown)

    @classmethod
    def of_numbers(cls, values: Sequence[float], number: Number) -> "Scale":
        """Return the scale of the scores."""
        ordered, is_log = sorted(values), is_spread(values)
        marks = {number(value): value for value in _three(ordered, is_log)}
        return cls(ordered[0], ordered[-1], is_log, {}, marks)

    def x(self, text: str) -> float:
        return self.at(self.places[text])

    def at(self, value: float) -> float:
        """Return where a number lies; all in the middle if they are equal."""
        if self.low == self.high:
            return WIDTH / 2
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return MARGIN + share * (WIDTH - 2 * MARGIN)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Return (x, text) of each tick, from left to right."""
        return sorted((self.at(place), text) for text, place in self.marks.items())


def _three(ordered: Sequence[float], is_log: bool) -> tuple[float, float, float]:
    """Return the lowest number, what is in the middle of the axis, and the highest."""
    low, high = ordered[0], ordered[-1]
    return low, math.sqrt(low * high) if is_log else (low + high) / 2, high


def short_number(text: str, number: Number) -> str:
    """Return a number as given, or rounded if it has many digits, as those of a search have."""
    return text if len(text) <= _MOST_DIGITS else number(float(text))


def thinned(ticks: Sequence[tuple[float, str]]) -> tuple[tuple[float, float, str], ...]:
    """Return the ticks whose texts do not touch each other, each with the middle of its text.

    The first and the last one stay; a long text is cut.
    """
    room = (WIDTH - 2 * MARGIN) / max(1, min(len(ticks), 4) - 1) / _WIDTH_OF_A_LETTER - 2
    short = [(x, clipped(text, min(_MOST_LETTERS, int(room)))) for x, text in ticks]
    kept = short[:1]
    for tick in short[1:-1]:
        if _are_apart(kept[-1], tick) and _are_apart(tick, short[-1]):
            kept.append(tick)
    kept += short[-1:] if len(short) > 1 else []
    return tuple((x, sum(_span((x, text))) / 2, text) for x, text in kept)


def _are_apart(left: tuple[float, str], right: tuple[float, str]) -> bool:
    """Return whether two texts, each around its tick but within the drawing, leave a gap."""
    return _span(left)[1] + _WIDTH_OF_A_LETTER < _span(right)[0]


def _span(tick: tuple[float, str]) -> tuple[float, float]:
    half = len(tick[1]) * _WIDTH_OF_A_LETTER / 2
    middle = min(max(tick[0], half), WIDTH - half)
    return middle - half, middle + half


def clipped(text: str, most: int) -> str:
    """Return a text of at most so many letters, without the middle of a long one: paths end in a name."""
    text = " ".join(text.split()) or "–"
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[len(text) - (most - 1 - half) :]}"
