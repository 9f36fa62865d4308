"""Compute what the scores of two models on the same records show about their difference. Pure."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from capas.evaluation.power import POWER_FRACTION, quantiles

_DRAWS = 2**22  # record indices in memory at once


def perplexity(loss: float) -> float | None:
    """Return exp of the mean loss in nats per token: the number of tokens among which the model wavers.

    None if it is larger than a float can be.
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
    """Return the mean of after - before over records, with its percentile bootstrap interval (Efron 1979).

    Records are drawn in pairs, so that the difficulty of a record cancels out.

    Args:
        before, after: [records], scores of the same records in the same order.
        weights: [records], 1 each, or the number of tokens in each record if scores are means over tokens.

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


def verdict(interval: Mapping[str, float], higher_is_better: bool = True) -> str:
    """Return `better` or `worse`, or `no difference seen` if the interval contains zero.

    Args:
        interval: low and high of `paired_difference`.
    """
    low, high = sorted(interval[end] * (1 if higher_is_better else -1) for end in ("low", "high"))
    return "better" if low > 0 else "worse" if high < 0 else "no difference seen"


def records_needed(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float],
    *,
    confidence_fraction: float,
    power_fraction: float = POWER_FRACTION,
) -> int | None:
    """Return how many records show a difference of the observed size with probability `power_fraction`.

    ((z_c + z_p) x sd / |mean|)^2, rounded up, where sd is the standard deviation of the paired differences,
    z_c the normal quantile of (1 + confidence) / 2 and z_p that of the power. With weights the mean is a
    ratio of sums, and sd is that of its linearised residuals w (d - mean) / mean(w).

    Returns:
        At least 2; None if the mean is 0, or if there is only one record, which has no sd.

    Source: J. Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, for paired means; for
    evaluations of language models E. Miller, "Adding Error Bars to Evals", 2024, arXiv:2411.00640. Linearised
    ratio: W. G. Cochran, "Sampling Techniques", 1977, chapter 6.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    weight = np.asarray(weights, dtype=np.float64)
    mean = (difference * weight).sum() / weight.sum()
    if mean == 0 or len(difference) < 2:
        return None
    spread = (weight * (difference - mean) / weight.mean()).std(ddof=1)
    factor = quantiles(confidence_fraction, power_fraction)
    needed = float((factor * spread / abs(mean)) ** 2)
    return max(2, math.ceil(needed)) if math.isfinite(needed) else None


def _resampled_means(
    weighted: np.ndarray, weight: np.ndarray, resamples: int, seed: int
) -> Iterator[np.ndarray]:
    """Yield the weighted means of `resamples` draws with replacement, in chunks."""
    rng = np.random.default_rng(seed)
    num_records = len(weight)
    rows = max(1, _DRAWS // num_records)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, num_records, (min(rows, resamples - start), num_records))
        yield weighted[drawn].sum(axis=1) / weight[drawn].sum(axis=1)
