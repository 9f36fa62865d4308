"""Macro-F1, calibration error and their intervals against values computed by hand and by scikit-learn."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve as sklearn_curve
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, log_loss

from capas.core.params import Params
from capas.evaluation.comparison import paired_difference, statistic_difference
from capas.evaluation.label_metrics import (
    NUM_BINS,
    Decisions,
    balanced_accuracy,
    calibration_curve,
    calibration_error,
    compare_labels,
    confusion,
    label_baselines,
    label_facts,
    macro_f1,
)
from capas.evaluation.label_set import LabelSet
from capas.evaluation.match_metrics import same_label
from capas.evaluation.names import LABEL_SCORES

NAMES = ["ham", "phishing", "spam"]
PARAMS = Params(
    {"evaluation": {"bootstrap_resamples": 400, "confidence_fraction": 0.95, "seed": 0}}
)


def row(number: int, right: str, probabilities: list[float]) -> dict[str, Any]:
    best = NAMES[probabilities.index(max(probabilities))]
    return {
        **{"id": str(number), "reference": right, "completion": best},
        "label_accuracy": best == right,
        "label_log_loss": -math.log(probabilities[NAMES.index(right)]),
        "label_probabilities": [
            {"label": name, "probability": p} for name, p in zip(NAMES, probabilities, strict=True)
        ],
    }


ROWS = [
    row(0, "ham", [0.9, 0.05, 0.05]),
    row(1, "ham", [0.85, 0.05, 0.1]),
    row(2, "ham", [0.3, 0.1, 0.6]),
    row(3, "spam", [0.1, 0.2, 0.7]),
    row(4, "phishing", [0.5, 0.2, 0.3]),
]
FOUND = Decisions.of(ROWS, NAMES)


def decisions(seed: int, count: int = 60) -> Decisions:
    rng = np.random.default_rng(seed)
    right, chosen = rng.integers(0, 3, count), rng.integers(0, 3, count)
    return Decisions(right, chosen, rng.uniform(0.34, 1.0, count), 3)


def test_confusion_has_a_row_for_each_right_label() -> None:
    assert confusion(FOUND).tolist() == [[2, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert confusion(FOUND).tolist() == confusion_matrix(FOUND.right, FOUND.chosen).tolist()


def test_macro_f1_by_hand() -> None:
    ham, phishing, spam = 2 * 2 / (3 + 3), 0.0, 2 * 1 / (1 + 2)
    assert macro_f1(FOUND)[0] == pytest.approx((ham + phishing + spam) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_that_of_scikit_learn(seed: int) -> None:
    found = decisions(seed)
    expected = f1_score(found.right, found.chosen, average="macro")
    assert macro_f1(found)[0] == pytest.approx(expected)
    expected = balanced_accuracy_score(found.right, found.chosen)
    assert balanced_accuracy(found)[0] == pytest.approx(expected)


def test_a_label_that_no_record_has_is_left_out() -> None:
    """Choosing it costs the recall of the right label, and no F1 of its own: denominators stay equal."""
    right, chosen = np.array([0, 0, 2, 2]), np.array([0, 1, 2, 2])
    found = Decisions(right, chosen, None, 3)
    expected = f1_score(right, chosen, labels=[0, 2], average="macro")
    assert macro_f1(found)[0] == pytest.approx(expected) == pytest.approx((2 / 3 + 1) / 2)


def test_a_weight_counts_a_record_several_times() -> None:
    weights = np.array([[2.0, 1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 3.0, 0.0]])
    drawn = Decisions.of([ROWS[0], ROWS[0], ROWS[1], ROWS[3], ROWS[4]], NAMES)
    assert macro_f1(FOUND, weights).tolist() == pytest.approx([macro_f1(drawn)[0], 1.0])
    expected = [calibration_error(drawn)[0], abs(1 - 0.7)]
    assert calibration_error(FOUND, weights).tolist() == pytest.approx(expected)


def test_calibration_error_by_hand() -> None:
    """Each of five confidences has a bin of its own; then two share one."""
    gaps = [abs(1 - 0.9), abs(1 - 0.85), abs(0 - 0.6), abs(1 - 0.7), abs(0 - 0.5)]
    assert calibration_error(FOUND)[0] == pytest.approx(sum(gaps) / 5)
    same_bin = [row(0, "ham", [0.95, 0.03, 0.02]), row(1, "spam", [0.97, 0.02, 0.01])]
    found = Decisions.of(same_bin, NAMES)
    assert calibration_error(found)[0] == pytest.approx(abs(0.5 - 0.96))
    assert calibration_curve(found) == [
        {
            **{"low": 14 / NUM_BINS, "high": 1.0, "num_records": 2},
            **{"confidence": pytest.approx(0.96), "accuracy": 0.5},
        }
    ]


def test_a_bin_holds_its_upper_edge() -> None:
    found = Decisions(np.array([0, 0]), np.array([0, 0]), np.array([1.0, 1 / 3]), 3)
    assert [(part["low"], part["high"]) for part in calibration_curve(found)] == [
        (4 / NUM_BINS, 5 / NUM_BINS),
        (14 / NUM_BINS, 1.0),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_is_that_of_scikit_learn(seed: int) -> None:
    found = decisions(seed)
    hits = found.chosen == found.right
    accuracy, confidence = sklearn_curve(hits, found.confidence, n_bins=NUM_BINS)
    curve = calibration_curve(found)
    assert [part["accuracy"] for part in curve] == pytest.approx(accuracy.tolist())
    assert [part["confidence"] for part in curve] == pytest.approx(confidence.tolist())
    total = sum(p["num_records"] * abs(p["accuracy"] - p["confidence"]) for p in curve)
    assert calibration_error(found)[0] == pytest.approx(total / len(hits))


def test_perfect_calibration_has_no_error() -> None:
    right, chosen = np.zeros(4, dtype=int), np.array([0, 0, 0, 1])
    assert calibration_error(Decisions(right, chosen, np.full(4, 0.75), 2))[0] == 0.0


def test_facts_hold_the_mean_log_loss() -> None:
    labels = LabelSet(NAMES, [3, 1, 1], "x")
    facts = label_facts(ROWS, labels)
    probabilities = [[entry["probability"] for entry in r["label_probabilities"]] for r in ROWS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = log_loss([r["reference"] for r in ROWS], probabilities, labels=NAMES)
    assert facts["label_log_loss"] == pytest.approx(expected)
    assert facts["labels"]["names"] == NAMES and facts["labels"]["num_train"] == [3, 1, 1]


def test_the_majority_has_high_accuracy_and_low_macro_f1() -> None:
    rows = [row(i, "spam" if i < 2 else "ham", [0.5, 0.2, 0.3]) for i in range(20)]
    labels = LabelSet(NAMES, [90, 2, 8], "x")
    base = label_baselines({"nearest": {"label_accuracy": 0.5}}, rows, labels)
    majority = base["majority"]
    assert (majority["label"], majority["train_fraction"]) == ("ham", 0.9)
    assert majority["label_accuracy"] == 0.9
    assert majority["label_macro_f1"] == pytest.approx((2 * 18 / 38 + 0) / 2)
    assert majority["label_balanced_accuracy"] == 0.5
    same = ("label_balanced_accuracy", "label_macro_f1")
    assert base["nearest"] == {"label_accuracy": 0.5, **{name: majority[name] for name in same}}


def test_the_interval_of_a_mean_is_the_paired_one() -> None:
    """A mean as a statistic has the bootstrap of `paired_difference`, draw by draw, and its skewness."""
    rng = np.random.default_rng(1)
    before, after = rng.random(40), rng.random(40) ** 2
    settings = {"resamples": 500, "confidence_fraction": 0.9, "seed": 3}
    expected = paired_difference(before, after, np.ones(40), **settings)
    gains = after - before
    found = statistic_difference(lambda w: (w @ gains) / w.sum(axis=1), 40, **settings)
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_single_record_has_an_interval_without_width() -> None:
    settings = {"resamples": 100, "confidence_fraction": 0.95, "seed": 0}
    found = statistic_difference(lambda w: w.sum(axis=1) * 0.25, 1, **settings)
    assert found == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_a_better_model_is_better_by_every_score_of_labels() -> None:
    rights = [NAMES[i % 3] for i in range(60)]
    always = [row(i, right, [0.8, 0.1, 0.1]) for i, right in enumerate(rights)]
    sure = [row(i, right, _sure_of(right)) for i, right in enumerate(rights)]
    labels = LabelSet(NAMES, [20, 20, 20], "x")
    base = label_baselines({**label_facts(always, labels), "nearest": {}}, always, labels)
    report = {"tuned": label_facts(sure, labels), "shares": [], "difference": {}}
    report["difference"] = {"label_accuracy": {"verdict": "better"}, "loss": {}}
    found = compare_labels(report, always, sure, base, PARAMS)
    difference = found["difference"]
    for name in LABEL_SCORES:
        part = difference[name]
        assert part["verdict"] == "better" and part["low"] <= part["mean"] <= part["high"]
    assert difference["label_macro_f1"]["mean"] == pytest.approx(1 - 2 * 20 / 80 / 3)
    assert difference["label_calibration_error"]["high"] < 0  # lower is better
    assert found["difference_to_majority"]["label_balanced_accuracy"]["verdict"] == "better"


def _sure_of(right: str) -> list[float]:
    return [0.96 if name == right else 0.02 for name in NAMES]


def test_a_model_without_skill_gains_nothing_over_the_majority() -> None:
    rows = [row(i, "spam" if i % 10 == 0 else "ham", [0.8, 0.1, 0.1]) for i in range(50)]
    labels = LabelSet(NAMES, [90, 2, 8], "x")
    base = label_baselines({**label_facts(rows, labels), "nearest": {}}, rows, labels)
    report = {
        "tuned": label_facts(rows, labels),
        "shares": [],
        "difference": {"label_accuracy": {}},
    }
    found = compare_labels(report, rows, rows, base, PARAMS)["difference_to_majority"]
    assert found["label_balanced_accuracy"] == {
        **{"mean": 0.0, "low": 0.0, "high": 0.0},
        **{"verdict": "no difference seen", "num_records_needed": None},
    }


def test_guessing_is_not_proven_to_be_better_than_the_majority() -> None:
    """By balanced accuracy. By macro-F1 most guessers of this kind would be."""
    passed = {balanced_accuracy: 0, macro_f1: 0}
    settings = {"resamples": 200, "confidence_fraction": 0.95, "seed": 0}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = Decisions(rng.integers(0, 2, 100), rng.integers(0, 2, 100), None, 2)
        always = found.always(0)
        for score in passed:
            gain = statistic_difference(
                lambda w, s=score, f=found, a=always: s(f, w) - s(a, w), 100, **settings
            )
            passed[score] += gain["low"] > 0
    assert passed[balanced_accuracy] <= 2 and passed[macro_f1] > 20


def test_a_copied_label_is_right_if_it_is_the_same_text() -> None:
    assert same_label(" devolución\n", "devolución")
    assert not same_label("tarjeta", "tarjeta perdida") and not same_label("1.0", "1")
