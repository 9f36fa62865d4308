"""Rank trials: replicates (other seeds) share a row with mean and interval, and ties count as ties."""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from capas.sweep.state import CACHED, DONE, State


@dataclass
class Row:
    """Trials that differ only in their replicate.

    Attributes:
        values: the objective by the overrides that set the replicate: ('seed=1',).
        tied: whether it is not shown to be worse than the first row.
    """

    overrides: list[str]
    states: list[State]
    values: dict[tuple[str, ...], float]
    confidence: float
    rank: int = 0
    tied: bool = False

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def margin(self) -> float | None:
        """Half the width of the mean's t interval; None for a single trial."""
        return _margin(list(self.values.values()), self.confidence)

    @property
    def name(self) -> str:
        """The experiment to adopt: the first replicate, not the best one."""
        return self.states[0].name

    def column(self, metric: str) -> float | None:
        """Return the mean of another metric; None if a trial does not have it."""
        found = [state.metrics.get(metric) for state in self.states]
        numbers = [value for value in found if value is not None]
        return statistics.fmean(numbers) if numbers and len(numbers) == len(found) else None


def rank(states: Sequence[State], settings: dict[str, Any]) -> list[Row]:
    """Return the rows, best first, without trials that failed or have not ended."""
    rows: dict[tuple[str, ...], Row] = {}
    for state in states:
        if state.status not in (DONE, CACHED):
            continue
        rest, replicate = _split(state.overrides, settings["replicates"])
        row = rows.setdefault(rest, Row(list(rest), [], {}, settings["confidence_fraction"]))
        value = state.metrics[settings["objective"]]
        assert value is not None
        row.states.append(state)
        row.values[replicate] = value
    sign = -1.0 if settings["direction"] == "maximize" else 1.0
    ordered = sorted(rows.values(), key=lambda row: (sign * row.mean, row.overrides))
    for row in ordered:
        row.states.sort(key=lambda state: _split(state.overrides, settings["replicates"])[1])
        row.tied = row is not ordered[0] and is_tie(ordered[0], row)
        better = sum(sign * other.mean < sign * row.mean for other in ordered)
        row.rank = 1 if row.tied else 1 + better
    return ordered


def is_tie(first: Row, other: Row) -> bool:
    """Return whether the interval of the difference of two rows' means contains zero.

    Replicates that both have (the same seeds) are compared pair by pair. Single trials are tied only if they
    are equal.
    """
    shared = [key for key in first.values if key in other.values]
    if len(shared) > 1:
        differences = [first.values[key] - other.values[key] for key in shared]
        margin = _margin(differences, first.confidence)
        return margin is not None and abs(statistics.fmean(differences)) <= margin
    if len(first.values) > 1 and len(other.values) > 1:
        return abs(first.mean - other.mean) <= _welch(first, other)
    return first.mean == other.mean


def _split(
    overrides: Collection[str], replicates: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the overrides that are compared, and those that set the replicate."""
    repeats = tuple(word for word in overrides if word.partition("=")[0] in replicates)
    return tuple(word for word in overrides if word not in repeats), repeats


def _margin(values: list[float], confidence: float) -> float | None:
    if len(values) < 2:
        return None
    return _t(confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _welch(first: Row, other: Row) -> float:
    """Return half the width of the interval of a difference of means with unequal variances."""
    parts = [
        (statistics.variance(row.values.values()) / len(row.values), len(row.values) - 1)
        for row in (first, other)
    ]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    degrees = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    return _t(first.confidence, degrees) * math.sqrt(variance)


def _t(confidence: float, degrees: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, degrees))
