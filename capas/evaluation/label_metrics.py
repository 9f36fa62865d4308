"""Compute the metrics of a classification: confusion, balanced accuracy, macro-F1, calibration. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.evaluation.comparison import statistic_difference, verdict
from capas.evaluation.difference import difference
from capas.evaluation.label_set import LabelSet, shown
from capas.evaluation.names import (
    BALANCED,
    CALIBRATION,
    LABEL,
    LOG_LOSS,
    LOWER_IS_BETTER,
    MACRO_F1,
)
from capas.evaluation.predictions import Row

NUM_BINS = 15  # of confidence, as in Guo et al.


@dataclass(frozen=True)
class Decisions:
    """The decisions of a classifier.

    Args:
        right, chosen: [records], positions of the labels.
        confidence: [records], the probability of the chosen label; None if the classifier gives none.
        num_labels: the number of labels.
    """

    right: np.ndarray
    chosen: np.ndarray
    confidence: np.ndarray | None
    num_labels: int

    @classmethod
    def of(cls, rows: Sequence[Row], names: Sequence[str]) -> "Decisions":
        """Return the decisions in rows of predictions or of copied answers."""
        at = {name: i for i, name in enumerate(names)}
        right, chosen = (
            np.array([at[row[column].strip()] for row in rows])
            for column in ("reference", "completion")
        )
        confidence = None
        if rows and "label_probabilities" in rows[0]:
            confidence = np.array([_highest(row["label_probabilities"]) for row in rows])
        return cls(right, chosen, confidence, len(names))

    def always(self, label: int) -> "Decisions":
        """Return the decisions of a classifier that always chooses one label."""
        chosen = np.full_like(self.chosen, label)
        return Decisions(self.right, chosen, None, self.num_labels)


def _highest(probabilities: Sequence[Row]) -> float:
    return float(max(entry["probability"] for entry in probabilities))


def confusion(found: Decisions) -> np.ndarray:
    """Return how often each label was chosen for each right label, [right, chosen]."""
    table = np.zeros((found.num_labels, found.num_labels), dtype=np.int64)
    np.add.at(table, (found.right, found.chosen), 1)
    return table


def macro_f1(found: Decisions, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the mean F1 over the labels that records have; rare labels count as much as frequent ones.

    F1 of a label is 2 x hits / (records that have it + records for which it was chosen). A label that no
    record has is left out, for every model alike; choosing it costs the recall of the right one. It is
    scikit-learn's `f1_score(right, chosen, labels=unique(right), average="macro")`.

    Args:
        weights: [draws, records], how often a record was drawn; None counts each once.

    Returns:
        [draws].
    """
    hits, having, chosen_for = _counts(found, weights)
    return _mean_over_labels(2 * hits, having + chosen_for, having > 0)


def balanced_accuracy(found: Decisions, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the mean recall over the labels that records have.

    Of k such labels, always choosing one of them has 1 / k, and so has, on average, choosing without looking
    at the record. (For macro-F1 guessing is better than always choosing one.)

    Args:
        weights: [draws, records], how often a record was drawn; None counts each once.

    Returns:
        [draws].

    Source: K. H. Brodersen, C. S. Ong, K. E. Stephan, J. M. Buhmann, "The Balanced Accuracy and Its Posterior
    Distribution", ICPR 2010.
    """
    hits, having, _ = _counts(found, weights)
    return _mean_over_labels(hits, having, having > 0)


def _counts(
    found: Decisions, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each label the hits, the records that have it, and those for which it was chosen.

    All are [draws, labels].
    """
    weights = np.ones((1, len(found.right))) if weights is None else weights
    places = np.arange(found.num_labels)
    right, chosen = found.right[:, None] == places, found.chosen[:, None] == places
    hits, having, chosen_for = (
        weights @ part.astype(np.float64) for part in (right & chosen, right, chosen)
    )
    return hits, having, chosen_for


def _mean_over_labels(parts: np.ndarray, wholes: np.ndarray, occurs: np.ndarray) -> np.ndarray:
    """Return the mean of parts / wholes over the labels that occur."""
    shares = np.divide(parts, wholes, out=np.zeros_like(parts), where=occurs)
    return np.asarray(shares.sum(axis=1) / occurs.sum(axis=1))


def calibration_error(found: Decisions, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the expected calibration error: the mean gap between confidence and accuracy over bins.

    Records are put into NUM_BINS bins of equal width by the probability of their chosen label. The error is
    the sum over bins of (records in the bin / all records) x |accuracy - mean confidence|. It is 0 for
    perfect calibration, and with few records it is too high: chance alone makes gaps.

    Args:
        weights: [draws, records], how often a record was drawn; None counts each once.

    Returns:
        [draws].

    Source: M. P. Naeini, G. Cooper, M. Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian
    Binning", AAAI 2015; C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural
    Networks", ICML 2017, equation 3, with 15 bins.
    """
    assert found.confidence is not None
    weights = np.ones((1, len(found.right))) if weights is None else weights
    gaps = (found.chosen == found.right) - found.confidence
    in_bin = _bins(found.confidence)[:, None] == np.arange(NUM_BINS)
    sums = weights @ np.where(in_bin, gaps[:, None], 0.0)
    return np.asarray(np.abs(sums).sum(axis=1) / weights.sum(axis=1))


def _bins(confidence: np.ndarray) -> np.ndarray:
    """Return the bin of each confidence: bin m holds those above m / NUM_BINS, up to (m + 1) / NUM_BINS."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)


def calibration_curve(found: Decisions) -> list[dict[str, Any]]:
    """Return mean confidence and accuracy of each bin that holds a record."""
    assert found.confidence is not None
    bins, hits = _bins(found.confidence), found.chosen == found.right
    return [
        {
            "low": number / NUM_BINS,
            "high": (number + 1) / NUM_BINS,
            "num_records": int(inside.sum()),
            "confidence": float(found.confidence[inside].mean()),
            "accuracy": float(hits[inside].mean()),
        }
        for number in range(NUM_BINS)
        if (inside := bins == number).any()
    ]


_SCORES = {BALANCED: balanced_accuracy, MACRO_F1: macro_f1, CALIBRATION: calibration_error}


def label_facts(rows: Sequence[Row], labels: LabelSet) -> dict[str, Any]:
    """Return the summary of a model's decisions: LABEL_SCORES, and `labels` with the tables."""
    found = Decisions.of(rows, labels.names)
    return {
        **_choices(found),
        LOG_LOSS: sum(row[LOG_LOSS] for row in rows) / len(rows),
        CALIBRATION: float(calibration_error(found)[0]),
        "labels": {
            "names": labels.names,
            "num_train": labels.counts,
            "origin": labels.origin,
            "confusion": confusion(found).tolist(),
            "calibration": calibration_curve(found),
        },
    }


def _choices(found: Decisions) -> dict[str, float]:
    """Return the scores that need no probabilities."""
    return {
        BALANCED: float(balanced_accuracy(found)[0]),
        MACRO_F1: float(macro_f1(found)[0]),
    }


def label_baselines(
    facts: Mapping[str, Any], copies: Sequence[Row], labels: LabelSet
) -> dict[str, Any]:
    """Return the facts of the base with the scores of two baselines.

    `nearest` gets the scores of copied answers. `majority` is always choosing the most frequent label of
    the training split: an accuracy of 90 % means little where 90 % of the records have one label.
    """
    copied = Decisions.of(copies, labels.names)
    nearest = {**facts["nearest"], **_choices(copied)}
    return {**facts, "nearest": nearest, "majority": _always_majority(copied, labels)}


def _always_majority(decisions: Decisions, labels: LabelSet) -> dict[str, Any]:
    index = labels.names.index(labels.majority)
    found = decisions.always(index)
    return {
        "num_records": len(found.right),
        "label": labels.majority,
        "train_fraction": labels.counts[index] / sum(labels.counts),
        LABEL: float((found.right == index).mean()),
        **_choices(found),
        "by": {},
    }


def compare_labels(
    report: Mapping[str, Any],
    before: list[Row],
    after: list[Row],
    base: Mapping[str, Any],
    params: Params,
) -> dict[str, Any]:
    """Return the report of `difference.compare` with the differences of the scores of labels.

    `difference_to_majority` is that of balanced accuracy to always choosing the majority label.

    Args:
        base: reports/evaluation_base.json.

    Raises:
        CapasError: the base chose among other labels.
    """
    names = report["tuned"]["labels"]["names"]
    if base["labels"]["names"] != names:
        raise CapasError(
            f"reports/evaluation_base.json has other labels ({shown(base['labels']['names'])}) than the "
            f"tuned model ({shown(names)}). Run `dvc repro evaluate_base`"
        )
    one, other = Decisions.of(before, names), Decisions.of(after, names)
    always = other.always(names.index(base["majority"]["label"]))
    found = {
        BALANCED: _interval(BALANCED, one, other, params),
        MACRO_F1: _interval(MACRO_F1, one, other, params),
        LOG_LOSS: difference(before, after, LOG_LOSS, params),
        CALIBRATION: _interval(CALIBRATION, one, other, params),
    }
    return {
        **report,
        "difference": {LABEL: report["difference"][LABEL], **found, **report["difference"]},
        "difference_to_majority": {BALANCED: _interval(BALANCED, always, other, params)},
        "shares": [*report["shares"], BALANCED, MACRO_F1, CALIBRATION],
    }


def _interval(name: str, one: Decisions, other: Decisions, params: Params) -> dict[str, Any]:
    """Return a difference of a score that is no mean over records; the records needed are not known."""
    score = _SCORES[name]
    found = statistic_difference(
        lambda weights: score(other, weights) - score(one, weights),
        len(one.right),
        resamples=params.evaluation.bootstrap_resamples,
        confidence_fraction=params.evaluation.confidence_fraction,
        seed=params.evaluation.seed,
    )
    better = verdict(found, higher_is_better=name not in LOWER_IS_BETTER)
    return {**found, "verdict": better, "num_records_needed": None}
