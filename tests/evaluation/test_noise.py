"""The noise of batching, by hand, and the ratio of lengths."""

import math
from typing import Any

import pytest

from capas.core.params import Params
from capas.evaluation.difference import length_ratio
from capas.evaluation.noise import batching_noise, choose

SETTINGS = {"confidence_fraction": 0.95, "bootstrap_resamples": 400, "seed": 0}
PARAMS = Params({"evaluation": SETTINGS})


def rows(scores: list[float]) -> list[dict[str, Any]]:
    return [{"match": score, "completion": f"{i}: {score}"} for i, score in enumerate(scores)]


def noise(base: list[float], tuned: list[float], alone: list[float], count: int) -> dict[str, Any]:
    """The base answers alike in both decodings."""
    batched = {"base": rows(base), "tuned": rows(tuned)}
    return batching_noise(batched, {**batched, "tuned": rows(alone)}, "match", count, PARAMS)


def test_answers_that_stay_make_no_noise() -> None:
    found = noise([0.0] * 20, [1.0] * 20, [1.0] * 20, 500)
    assert (found["noise"], found["chance"], found["num_records"]) == (0.0, 0.0, 20)
    assert found["num_changed_answers"] == {"base": 0, "tuned": 0}


def test_changes_in_both_directions_are_noise_that_falls_with_the_records() -> None:
    """2 of 20 gains change by 1: z sqrt(0.1 / N)."""
    before, after = [1.0, 0.0] * 10, [0.0, 1.0] + [1.0, 0.0] * 9
    few, many = (noise([0.0] * 20, before, after, count) for count in (20, 2000))
    assert few["shift"]["mean"] == 0
    assert few["noise"] == pytest.approx(1.96 * math.sqrt(0.1 / 20), rel=1e-3)
    assert many["noise"] == pytest.approx(few["noise"] / 10)
    assert few["num_changed_answers"] == {"base": 0, "tuned": 2}


def test_changes_in_one_direction_count_whole() -> None:
    found = noise([0.0] * 20, [1.0] * 20, [0.0] * 10 + [1.0] * 10, 100_000)
    assert found["shift"]["mean"] == -0.5 and found["chance"] < 0.01
    assert found["noise"] == -found["shift"]["low"] > 0.5


def test_base_and_tuned_model_answer_the_same_records() -> None:
    assert choose(100, 5) == choose(100, 5) == sorted(choose(100, 5)) != [0, 1, 2, 3, 4]
    assert choose(3, 5) == [0, 1, 2]
    assert {*choose(100, 5)} < {*choose(100, 20)}


def test_the_length_ratio_is_that_of_the_mean_lengths() -> None:
    answers = [("aaaa", "aa"), ("a", "aaa"), ("aa", "")]
    found = length_ratio([{"completion": c, "reference": r} for c, r in answers], PARAMS)
    assert found["mean"] == pytest.approx(7 / 6)  # an empty reference counts as one character
    assert found["low"] <= found["mean"] <= found["high"]


def test_equal_lengths_have_the_ratio_one() -> None:
    found = length_ratio([{"completion": "ab" * i, "reference": "cd" * i} for i in (1, 2)], PARAMS)
    assert found == {"mean": 1.0, "low": 1.0, "high": 1.0}
