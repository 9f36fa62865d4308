"""Scores of single records, and what a set of them says. Pure: numbers in, numbers out."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_DRAWS = 2**22  # indices in memory at once


def exact_match(completion: str, reference: str) -> bool:
    """Equal as JSON where the reference is JSON (spaces and the order of keys do not count), else as text.

    Text is compared without surrounding white space. 1 and 1.0 and true are three values.
    """
    try:
        expected = _parse(reference)
    except ValueError:
        return completion.strip() == reference.strip()
    try:
        return _canonical(_parse(completion)) == _canonical(expected)
    except (ValueError, RecursionError):
        return False


def valid_json(completion: str) -> bool:
    """A JSON object or array, whole: a bare number or word is no structured answer."""
    try:
        return isinstance(_parse(completion), dict | list)
    except (ValueError, RecursionError):
        return False


def perplexity(loss: float) -> float | None:
    """exp of the mean loss in nats a token: the number of tokens that the model wavers between.

    None where that is larger than a float can be.
    """
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float],
    *,
    resamples: int,
    confidence_fraction: float,
    seed: int,
) -> dict[str, float]:
    """Mean of after - before over records, with its percentile bootstrap interval (Efron 1979).

    Records are drawn in pairs, so that how hard a record is cancels out.

    Args:
        before, after: [records], scores of the same records in the same order.
        weights: [records], 1 each, or the tokens of each record where scores are means over tokens.

    Returns:
        mean, low, high.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    weight = np.asarray(weights, dtype=np.float64)
    tail = (1 - confidence_fraction) / 2
    means = np.concatenate(list(_resampled_means(difference * weight, weight, resamples, seed)))
    low, high = np.quantile(means, [tail, 1 - tail])
    mean = (difference * weight).sum() / weight.sum()
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _resampled_means(
    weighted: np.ndarray, weight: np.ndarray, resamples: int, seed: int
) -> Iterator[np.ndarray]:
    """Weighted means of `resamples` draws with replacement, some thousands at a time."""
    rng = np.random.default_rng(seed)
    num_records = len(weight)
    rows = max(1, _DRAWS // num_records)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, num_records, (min(rows, resamples - start), num_records))
        yield weighted[drawn].sum(axis=1) / weight[drawn].sum(axis=1)


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
