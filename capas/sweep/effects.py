"""Determine how the score responds to each swept key: all trials, and the mean of each value over the others.

A mean is over the settings that share a value. Its interval holds the noise of the seeds alone: the variance
of a trial, without what a seed does to all settings, pooled as in `comparison`. Without seeds there is none.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from capas.config.hydra_overrides import key_of
from capas.sweep.ranking import Row, scores, whole

MAX_LEVELS = 8  # numbers; more, as a search tries, are put into bins
NUM_BINS = 5
MAX_CATEGORIES = 30  # that are drawn
_LOG_RATIO = 10  # of two numbers, from which on their axis is logarithmic
_SPREAD = 50  # of scores, the largest over the smallest, from which on their axis is logarithmic
Point = tuple[float, float]  # position, score


@dataclass(frozen=True)
class Level:
    """A value of a key, or a bin of values.

    Attributes:
        text: the value as given; of a bin, its ends.
        position: the number, for a category its place; of a bin the median.
        mean: of the settings that have it.
        margin: half the interval's width; None without seeds.
    """

    text: str
    position: float
    mean: float
    margin: float | None
    num_rows: int


@dataclass(frozen=True)
class Effect:
    """The response of the score to a key.

    Attributes:
        points: all trials.
        levels: in the order of the axis.
        is_binned: whether a level is a bin of values.
        categories: the values that are no numbers, by place.
        num_left_out: further ones, which are not drawn.
    """

    key: str
    is_number: bool
    is_log: bool
    is_binned: bool
    points: tuple[Point, ...]
    levels: tuple[Level, ...]
    categories: tuple[str, ...] = ()
    num_left_out: int = 0

    @property
    def is_balanced(self) -> bool:
        """Return whether all levels are means over equally many settings."""
        return len({level.num_rows for level in self.levels}) < 2


def effects(
    rows: Sequence[Row], swept: Collection[str], settings: Mapping[str, Any]
) -> list[Effect]:
    """Return the responses to the keys that have several values among the rows, replicates aside."""
    keys = compared_keys(rows, swept, settings)
    return [_effect(key, rows, settings["confidence_fraction"]) for key in keys]


def compared_keys(
    rows: Sequence[Row], swept: Collection[str], settings: Mapping[str, Any]
) -> list[str]:
    """Return the swept keys, replicates aside, that have several values among the rows.

    A search over a key that the command does not name is found in the trials.
    """
    given = [key_of(word) for row in rows for word in row.overrides]
    keys = [k for k in dict.fromkeys([*swept, *given]) if k not in settings["replicates"]]
    return [key for key in keys if len({row.value(key) for row in rows}) > 1]


def number_of(text: str) -> float | None:
    """Return the number that a value is, or None; `nan` and `inf` are no places on an axis."""
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def is_logarithmic(numbers: Collection[float]) -> bool:
    """Return whether numbers lie more evenly on a logarithmic axis than on a linear one.

    >>> is_logarithmic([4, 8, 16]), is_logarithmic([1, 2, 3])
    (True, False)
    """
    values = sorted(set(numbers))
    if not values or values[0] <= 0 or values[0] == values[-1]:
        return False
    low, high, middle = values[0], values[-1], statistics.median(values)
    if len(values) == 2:
        return high / low >= _LOG_RATIO
    linear = (middle - low) / (high - low)
    logarithmic = math.log(middle / low) / math.log(high / low)
    return abs(logarithmic - 0.5) < abs(linear - 0.5)


def is_spread(scores: Collection[float]) -> bool:
    """Return whether scores differ by orders of magnitude, as losses of diverged trainings do."""
    return min(scores) > 0 and max(scores) / min(scores) >= _SPREAD


def _effect(key: str, rows: Sequence[Row], confidence: float) -> Effect:
    compared = whole(rows) or list(rows)
    numbers = {row.value(key): number_of(row.value(key)) for row in rows}
    found = {text: number for text, number in numbers.items() if number is not None}
    if is_number := len(found) == len(numbers):
        positions, left_out = found, 0
    else:
        positions, left_out = _places(key, rows)
    is_binned = is_number and len(set(positions.values())) > MAX_LEVELS
    groups = _bins(positions) if is_binned else _values(positions)
    errors = _errors(compared)
    levels = [_level(group, positions, key, compared, errors, confidence) for group in groups]
    return Effect(
        key=key,
        is_number=is_number,
        is_log=is_number and is_logarithmic(positions.values()),
        is_binned=is_binned,
        points=tuple(
            (positions[row.value(key)], score)
            for row in rows
            if row.value(key) in positions
            for score in row.values.values()
        ),
        levels=tuple(level for level in levels if level is not None),
        categories=() if is_number else tuple(positions),
        num_left_out=left_out,
    )


def _places(key: str, rows: Sequence[Row]) -> tuple[dict[str, float], int]:
    """Return the places of categories, in the order of their best rows, and how many are left out."""
    texts = list(dict.fromkeys(row.value(key) for row in rows))
    shown = {text: float(place) for place, text in enumerate(texts[:MAX_CATEGORIES])}
    return shown, len(texts) - len(shown)


def _values(positions: Mapping[str, float]) -> list[list[str]]:
    """Return the texts of each value, lowest first: 8 and 8.0 are one."""
    values = sorted(set(positions.values()))
    return [[text for text, place in positions.items() if place == value] for value in values]


def _bins(positions: Mapping[str, float]) -> list[list[str]]:
    """Return the texts in NUM_BINS groups of equal size, as far as possible, lowest first."""
    texts = sorted(positions, key=lambda text: positions[text])
    ends = [round(i * len(texts) / NUM_BINS) for i in range(NUM_BINS + 1)]
    return [texts[a:b] for a, b in pairwise(ends) if a < b]


def _errors(compared: Sequence[Row]) -> tuple[list[float], int] | None:
    """Return the variance of each setting's mean, and the degrees of freedom; None without seeds."""
    if len(compared) < 2 or any(row.missing or len(row.values) < 2 for row in compared):
        return None
    from capas.sweep.comparison import trial_variances

    variances, degrees = trial_variances(scores(compared))
    return [float(v) / len(compared[0].values) for v in variances], degrees


def _level(
    texts: Sequence[str],
    positions: Mapping[str, float],
    key: str,
    compared: Sequence[Row],
    errors: tuple[list[float], int] | None,
    confidence: float,
) -> Level | None:
    """Return the mean of the rows with one of these values; None if all of them lack replicates."""
    places = [i for i, row in enumerate(compared) if row.value(key) in texts]
    if not places:
        return None
    margin = None
    if errors is not None:
        from scipy.stats import t

        variances, degrees = errors
        error = math.sqrt(sum(variances[i] for i in places)) / len(places)
        margin = float(t.ppf((1 + confidence) / 2, degrees)) * error
    one_value = len({positions[text] for text in texts}) == 1
    return Level(
        text=texts[0] if one_value else f"{texts[0]} – {texts[-1]}",
        position=statistics.median(positions[text] for text in texts),
        mean=statistics.fmean(compared[i].mean for i in places),
        margin=margin,
        num_rows=len(places),
    )
