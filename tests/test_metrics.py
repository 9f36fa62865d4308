"""Metrics against values computed by hand."""

import math

import pytest

from capas.metrics import exact_match, paired_difference, perplexity, valid_json

CALL = '{"name": "set_timer", "arguments": {"minutes": 99}}'


@pytest.mark.parametrize(
    ("completion", "reference", "equal"),
    [
        (CALL, CALL, True),
        ('{"arguments":{"minutes":99},"name":"set_timer"}', CALL, True),
        ('{"name": "set_timer", "arguments": {"minutes": 98}}', CALL, False),
        ('{"name": "set_timer", "arguments": {"minutes": "99"}}', CALL, False),
        ('{"name": "set_timer", "arguments": {"minutes": 99}', CALL, False),
        (CALL + " Done.", CALL, False),
        ("Okay, 99 minutes.", CALL, False),
        ("", CALL, False),
        ("true", "1", False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        (" Okay. \n", "Okay.", True),
        ("okay.", "Okay.", False),
    ],
)
def test_exact_match(completion: str, reference: str, equal: bool) -> None:
    assert exact_match(completion, reference) is equal


@pytest.mark.parametrize(
    ("completion", "valid"),
    [
        (CALL, True),
        ("[]", True),
        (f" {CALL}\n", True),
        ("99", False),
        ('"timer"', False),
        ("{'a': 1}", False),
        ('{"a": NaN}', False),
        (CALL[:-1], False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_valid_json(completion: str, valid: bool) -> None:
    assert valid_json(completion) is valid


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(8)) == pytest.approx(8)


def difference(before: list[float], after: list[float], **kwargs: object) -> dict[str, float]:
    options = {"resamples": 2000, "confidence_fraction": 0.95, "seed": 0, **kwargs}
    options = {"weights": [1] * len(before), **options}
    return paired_difference(before, after, **options)  # type: ignore[arg-type]


def test_difference_of_the_same_scores_is_zero() -> None:
    assert difference([0, 1, 1], [0, 1, 1]) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_constant_gain_has_no_spread() -> None:
    assert difference([0, 1, 2], [0.5, 1.5, 2.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_interval_is_that_of_the_normal_approximation() -> None:
    """400 records, gain 1 for a quarter: mean 0.25, standard error sqrt(0.25 * 0.75 / 400) = 0.0217."""
    found = difference([0.0] * 400, [1.0] * 100 + [0.0] * 300, resamples=20_000)
    assert found["mean"] == 0.25
    assert found["low"] == pytest.approx(0.25 - 1.96 * 0.02165, abs=0.004)
    assert found["high"] == pytest.approx(0.25 + 1.96 * 0.02165, abs=0.004)


def test_weights_count_tokens() -> None:
    """3 tokens gain 1 each, 1 token loses 1: (3 - 1) / 4."""
    assert difference([0, 1], [1, 0], weights=[3, 1])["mean"] == 0.5


def test_seed_decides() -> None:
    scores = [0.0] * 10, [math.sin(i) for i in range(10)]
    assert difference(*scores) == difference(*scores)
    assert difference(*scores, seed=1) != difference(*scores)


def test_a_perplexity_beyond_all_floats_is_none() -> None:
    assert perplexity(709.0) == math.exp(709.0)
    assert perplexity(710.0) is None
