"""Rank trials: replicates (other seeds) share a row, and all rows that may be the best are marked."""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from capas.config.hydra_overrides import key_of
from capas.sweep.objective import AUTO
from capas.sweep.rungs import metric_of, sign_of
from capas.sweep.state import CACHED, DONE, DROPPED, State

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from capas.sweep.comparison import Comparison
    from capas.sweep.records import RecordScores

Overrides = tuple[str, ...]
_MAX_NAMES = 3  # of rows, in a sentence
FEWEST_RECORDS = 20  # whose differences tell how much they vary


@dataclass
class Row:
    """A setting: trials that differ only in their replicate.

    Attributes:
        values: the objective by the overrides that set the replicate: ('seed=1',).
        rank: 1 for the first and all that are tied with it; 0 if it is compared with none.
        missing: the replicates that other rows have and this one lacks; it is then compared with none.
        is_default: whether it has the values of conf/.
        tied: whether it may be as good as the first row.
        num_dropped: how many other settings successive halving dropped; they count as looked at.
        rung: (step, number of steps) where successive halving dropped it; `values` are those there.
        records: the scores of each record, as `values`; those of trials that have them.
    """

    overrides: list[str]
    states: list[State]
    values: dict[Overrides, float]
    confidence: float
    rank: int = 0
    tied: bool = False
    missing: tuple[Overrides, ...] = ()
    is_default: bool = False
    rung: tuple[int, int] | None = None
    num_dropped: int = 0
    records: "dict[Overrides, RecordScores]" = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def margin(self) -> float | None:
        """Half the width of the mean's t interval over its replicates; None for a single trial."""
        values = list(self.values.values())
        if len(values) < 2:
            return None
        from scipy.stats import t

        quantile = float(t.ppf((1 + self.confidence) / 2, len(values) - 1))
        return quantile * statistics.stdev(values) / math.sqrt(len(values))

    @property
    def name(self) -> str:
        """The experiment to adopt: the first replicate, not the best one."""
        return self.states[0].name

    def value(self, key: str) -> str:
        """Return the value of an overridden key as given, an empty text if there is none."""
        found = (word.partition("=")[2] for word in self.overrides if key_of(word) == key)
        return next(found, "")

    def column(self, metric: str) -> float | None:
        """Return the mean of another metric; None if a trial does not have it."""
        found = [state.metrics.get(metric) for state in self.states]
        numbers = [value for value in found if value is not None]
        return statistics.fmean(numbers) if numbers and len(numbers) == len(found) else None


def rank(
    states: Sequence[State],
    settings: dict[str, Any],
    defaults: Collection[Overrides] = (),
    records: "Mapping[str, RecordScores]" = MappingProxyType({}),
) -> list[Row]:
    """Return the rows, best first, without trials that failed or have not ended.

    Rows that lack replicates come last: a mean over fewer seeds is no better or worse, only less certain.

    Args:
        defaults: the overrides of trials with the values of conf/, replicates aside.
        records: the scores of each record by the trial's name, from `capas.sweep.records`.
    """
    ended = [state for state in states if state.status in (DONE, CACHED)]
    rows = _grouped(ended, settings, settings["objective"])
    for state in ended:
        rest, replicate = split(state.overrides, settings["replicates"])
        if state.name in records:
            rows[rest].records[replicate] = records[state.name]
    dropped = dropped_rows(states, settings)
    every = sorted({replicate for row in rows.values() for replicate in row.values})
    known = {split(found, settings["replicates"])[0] for found in defaults}
    for rest, row in rows.items():
        row.states.sort(key=lambda state: split(state.overrides, settings["replicates"])[1])
        row.missing = tuple(replicate for replicate in every if replicate not in row.values)
        row.is_default = rest in known
        row.num_dropped = len(dropped)
    sign = -1.0 if settings["direction"] == "maximize" else 1.0
    ordered = sorted(
        rows.values(), key=lambda row: (bool(row.missing), sign * row.mean, row.overrides)
    )
    _mark(ordered, settings)
    return ordered


def dropped_rows(states: Sequence[State], settings: dict[str, Any]) -> list[Row]:
    """Return the settings that successive halving dropped, the furthest first, by their score there."""
    there = [state for state in states if state.status == DROPPED]
    rows = _grouped(there, settings, metric_of(settings)).values()
    for row in rows:
        row.rung = row.states[0].step, row.states[0].num_steps
    return sorted(rows, key=lambda row: (-row.states[0].step, sign_of(settings) * row.mean))


def _grouped(
    states: Iterable[State], settings: dict[str, Any], metric: str
) -> dict[Overrides, Row]:
    """Return a row for each setting, with the values of a metric by replicate."""
    rows: dict[Overrides, Row] = {}
    for state in states:
        rest, replicate = split(state.overrides, settings["replicates"])
        row = rows.setdefault(rest, Row(list(rest), [], {}, settings["confidence_fraction"]))
        value = state.metrics[metric]
        assert value is not None
        row.states.append(state)
        row.values[replicate] = value
    return rows


def num_looked_at(rows: Sequence[Row]) -> int:
    """Return the number of settings that were compared, those dropped before their end among them."""
    return len(rows) + rows[0].num_dropped


def replicate_key(settings: Mapping[str, Any]) -> str:
    """Return the key with which a user repeats trials."""
    found: str = (*settings["replicates"], "seed")[0]
    return found


def whole(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have all replicates, which can be compared."""
    return [row for row in rows if not row.missing]


def columns(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Return the metrics shown next to the objective; `auto` is the headline metric of each trial."""
    own = dict.fromkeys(state.headline for row in rows for state in row.states if state.headline)
    shown = [name for word in settings["columns"] for name in (own if word == AUTO else [word])]
    return [name for name in dict.fromkeys(shown) if name != settings["objective"]]


def scores(compared: Sequence[Row]) -> "NDArray[np.float64]":
    """Return the objective of whole rows, [rows, replicates]."""
    import numpy as np

    replicates = sorted(compared[0].values)
    return np.array([[row.values[name] for name in replicates] for row in compared])


def comparison(rows: Sequence[Row], settings: dict[str, Any]) -> "Comparison | None":
    """Return what the trials show of the whole rows.

    None if there are not two rows, or if nothing tells how much they would vary: neither a second replicate
    nor the scores of each record.
    """
    compared = whole(rows)
    if len(compared) < 2:
        return None
    replicates, by_record = sorted(compared[0].values), lack_of_records(compared) is None
    if len(replicates) < 2 and not by_record:
        return None
    from capas.sweep.comparison import compare
    from capas.sweep.records import stacked

    sign = 1.0 if settings["direction"] == "maximize" else -1.0
    default = next((place for place, row in enumerate(compared) if row.is_default), None)
    of_records = (
        [[row.records[name] for name in replicates] for row in compared] if by_record else []
    )
    records = sign * stacked(of_records) if by_record else None
    degrees = min((of.degrees for row in of_records for of in row), default=None)
    confidence = settings["confidence_fraction"]
    num_dropped = compared[0].num_dropped
    return compare(sign * scores(compared), default, confidence, records, degrees, num_dropped)


def first_names(names: Sequence[str]) -> dict[str, Any]:
    """Return the first names and how many more there are, for a sentence."""
    return {"names": names[:_MAX_NAMES], "more": len(names[_MAX_NAMES:])}


def lack_of_records(compared: Sequence[Row]) -> tuple[str, dict[str, Any]] | None:
    """Return why nothing can be said about other records, as a text below `verdict` and its facts; or None.

    Args:
        compared: whole rows.
    """
    without = [row.name for row in compared if row.records.keys() != row.values.keys()]
    if without:
        return "no_records", first_names(without)
    of_records = [of for row in compared for of in row.records.values()]
    if any(of.ids != of_records[0].ids for of in of_records):
        return "other_records", {}
    if len(of_records[0].ids) < FEWEST_RECORDS:
        return "few_records", {"count": len(of_records[0].ids)}
    return None


def _mark(ordered: Sequence[Row], settings: dict[str, Any]) -> None:
    """Number the whole rows, and mark those that may be as good as the first; the others get no number."""
    compared, found = whole(ordered), comparison(ordered, settings)
    for place, row in enumerate(compared):
        equal = row.mean == compared[0].mean
        row.tied = place > 0 and (found.may_be_best[place] if found else equal)
        first = next(i for i, other in enumerate(compared) if other.mean == row.mean)
        row.rank = 1 if row.tied else first + 1


def split(overrides: Collection[str], replicates: Collection[str]) -> tuple[Overrides, Overrides]:
    """Return the overrides that are compared, and those that set the replicate."""
    repeats = tuple(word for word in overrides if word.partition("=")[0] in replicates)
    return tuple(word for word in overrides if word not in repeats), repeats
