"""Read the score of each record of a trial, from DVC's cache, if the objective is a mean over records."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capas.evaluation.predictions import RATES
from capas.sweep.plan import Plan
from capas.sweep.state import CACHED, DONE, State
from capas.training.record_scores import FILE as VALIDATION

log = logging.getLogger("capas")
Array = NDArray[np.float64]
PREDICTIONS = "reports/predictions.parquet"
_TOKENS = "num_supervised_tokens"
_SUMS = {"validation_loss": "loss_sum", "validation_token_accuracy": "num_hits"}
_MEANS_OVER_TOKENS = ("loss", "token_accuracy")
_COLUMNS = {rate: column for column, rate in RATES.items()}
_CLOSE = 1e-5  # relative; reports/metrics/ have six digits


@dataclass(frozen=True)
class RecordScores:
    """The scores of a trial's records, whose mean is the objective.

    Attributes:
        sums, weights: [records]; for a mean over tokens the sum over a record's tokens and their number, for
            a mean over records its score and 1.
    """

    ids: tuple[str, ...]
    sums: Array
    weights: Array

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.weights.sum())

    def values(self) -> Array:
        """Return a value for each record, whose plain mean varies as `mean` does: the jackknife's.

        With weights of 1 they are the scores. A mean over tokens is a ratio of two sums over records, both of
        which vary with the records (Miller 1974, "The jackknife - a review", Biometrika 61).
        """
        without = self.weights.sum() - self.weights
        moved = (self.sums - self.mean * self.weights) / without
        found: Array = self.mean + (len(self.ids) - 1) * moved
        return found

    @property
    def degrees(self) -> int:
        """Return the degrees of freedom of a variance over the records.

        One less than their number if all weigh the same, and fewer if a few long ones decide, as if scores
        per token vary as much in long records as in short ones (Satterthwaite 1946, "An approximate
        distribution of estimates of variance components", Biometrics Bulletin 2).
        """
        squares = self.weights**2
        return max(1, math.floor(squares.sum() ** 2 / (squares**2).sum() + 1e-9) - 1)


def read_scores(plan: Plan, states: Iterable[State], objective: str) -> dict[str, RecordScores]:
    """Return the scores of the finished trials, by experiment, as far as DVC's cache holds them."""
    place = place_of(objective)
    if place is None:
        return {}
    found = {}
    for state in states:
        if state.status in (DONE, CACHED):
            file = plan.outputs(state.name).find(place.file)
            scores = None if file is None else _read(file, place)
            if scores is not None and _is_mean(scores, state.metrics[objective]):
                found[state.name] = scores
    return found


@dataclass(frozen=True)
class Place:
    """The place of each record's score: a file and its columns.

    Attributes:
        weight: the column of the weights; None if each record counts once.
        is_sum: whether the score is summed over the record's tokens already.
    """

    file: str
    column: str
    weight: str | None = None
    is_sum: bool = False


def place_of(objective: str) -> Place | None:
    """Return where an objective's scores stand; None if no stage writes a score of each record."""
    file, _, key = objective.partition(".")
    if file == "train" and key in _SUMS:
        return Place(VALIDATION, _SUMS[key], _TOKENS, is_sum=True)
    if file == "tuned" and key in _MEANS_OVER_TOKENS:
        return Place(PREDICTIONS, key, _TOKENS)
    return Place(PREDICTIONS, _COLUMNS.get(key, key)) if file == "tuned" else None


def _read(file: Path, place: Place) -> RecordScores | None:
    """Return the scores in a file; None if it has no such column, or, with a warning, if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = ["id", place.column, *filter(None, [place.weight])]
    try:
        table = pq.read_table(file, columns=wanted)
    except pa.ArrowInvalid as error:
        log.warning("the sweep cannot judge other records: %s is damaged (%s)", file, error)
        return None
    if {*table.column_names} != {*wanted} or any(column.null_count for column in table.columns):
        return None
    ids, scores, *weights = (table[name].to_pylist() for name in wanted)
    weight = np.array(weights[0] if weights else [1] * len(ids), dtype=np.float64)
    score = np.array(scores, dtype=np.float64)
    return RecordScores(tuple(ids), score if place.is_sum else score * weight, weight)


def _is_mean(scores: RecordScores, objective: float | None) -> bool:
    return objective is not None and bool(np.isclose(scores.mean, objective, rtol=_CLOSE))


def stacked(scores: Sequence[Sequence[RecordScores]]) -> Array:
    """Return the values of trials with the same records, [settings, seeds, records]."""
    return np.array([[of.values() for of in row] for row in scores])
