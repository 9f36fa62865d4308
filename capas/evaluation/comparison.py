"""Compute what the scores of two models on the same records show about their difference. Pure."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist

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
    """Return the mean of after - before over records, with its bootstrap interval.

    Records are drawn in pairs, so that the difficulty of a record cancels out. Each end is the farther one of
    the percentile and the BCa interval, both at a level that is corrected for few records: the percentile
    interval alone is too narrow for skewed scores, BCa alone for rare changes of right to wrong
    (`benchmarks/gate.py`).

    Args:
        before, after: [records], scores of the same records in the same order.
        weights: [records], 1 each, or the number of tokens in each record if scores are means over tokens.

    Returns:
        mean, low, high.

    Source: B. Efron, "Better bootstrap confidence intervals", JASA 82 (1987), for BCa; T. C. Hesterberg,
    "What teachers should know about the bootstrap", The American Statistician 69 (2015), for few records.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    weight = np.asarray(weights, dtype=np.float64)
    weighted, mean = difference * weight, (difference * weight).sum() / weight.sum()
    means = np.concatenate(list(_resampled_means(weighted, weight, resamples, seed)))
    return _interval(means, mean, weighted - mean * weight, confidence_fraction)


def statistic_difference(
    statistic: Callable[[np.ndarray], np.ndarray],
    num_records: int,
    *,
    resamples: int,
    confidence_fraction: float,
    seed: int,
) -> dict[str, float]:
    """Return a difference that is no mean over records, with its bootstrap interval.

    The records are drawn as in `paired_difference`. The influence of a record, for BCa, is what changes
    when it is left out (jackknife).

    Args:
        statistic: the difference of both models for each draw: from [draws, records], how often a record was
            drawn, to [draws].

    Returns:
        mean (the difference on all records), low, high.

    Source: B. Efron, R. J. Tibshirani, "An Introduction to the Bootstrap", 1993, section 14.3.
    """
    observed = float(statistic(np.ones((1, num_records)))[0])
    counts = _resampled_counts(num_records, resamples, seed)
    drawn = np.concatenate([statistic(some) for some in counts])
    influence = np.zeros(num_records)
    if num_records > 1:
        left_out = np.concatenate([statistic(some) for some in _all_but_one(num_records)])
        influence = left_out.mean() - left_out
    return _interval(drawn, observed, influence, confidence_fraction)


def _interval(
    drawn: np.ndarray, observed: float, influence: np.ndarray, confidence_fraction: float
) -> dict[str, float]:
    """Return the observed value and the farther ends of its percentile and its BCa interval.

    Args:
        drawn: [resamples].
        influence: [records], of each record on the value, but for a common factor.
    """
    z = _expanded(NormalDist().inv_cdf((1 + confidence_fraction) / 2), len(influence))
    levels = [NormalDist().cdf(sign * z) for sign in (-1, 1)]
    levels += _bca_levels(drawn, observed, influence, z)
    ends = np.quantile(drawn, levels)
    return {"mean": float(observed), "low": float(min(ends)), "high": float(max(ends))}


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


def _expanded(z: float, num_records: int) -> float:
    """Return the normal quantile at which a bootstrap interval is as wide as Student's, sqrt(n / (n - 1)) t.

    Source of t: Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, 26.7.5.
    """
    if num_records < 2:
        return z
    free = num_records - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return math.sqrt(num_records / free) * t


def _bca_levels(drawn: np.ndarray, observed: float, influence: np.ndarray, z: float) -> list[float]:
    """Return the levels of the two ends of the BCa interval, corrected for bias and skewness.

    Args:
        drawn: [resamples].
        influence: [records], of each record on the value, but for a common factor.
        z: normal quantile of the upper end.
    """
    below = float(np.mean(drawn < observed) + np.mean(drawn == observed) / 2)
    edge = 0.5 / len(drawn)
    bias = NormalDist().inv_cdf(min(max(below, edge), 1 - edge))
    spread = float((influence**2).sum()) ** 1.5
    skew = float((influence**3).sum()) / (6 * spread) if spread > 0 else 0.0
    shifted = (bias + sign * z for sign in (-1, 1))
    return [NormalDist().cdf(bias + s / max(1 - skew * s, 1e-9)) for s in shifted]


def _resampled_means(
    weighted: np.ndarray, weight: np.ndarray, resamples: int, seed: int
) -> Iterator[np.ndarray]:
    """Yield the weighted means of `resamples` draws with replacement, in chunks."""
    for drawn in _resampled(len(weight), resamples, seed):
        yield weighted[drawn].sum(axis=1) / weight[drawn].sum(axis=1)


def _resampled_counts(num_records: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each record was drawn, [draws, records], in chunks."""
    for drawn in _resampled(num_records, resamples, seed):
        rows = len(drawn)
        places = drawn + num_records * np.arange(rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=rows * num_records)
        yield counts.reshape(rows, num_records).astype(np.float64)


def _resampled(num_records: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the indices of the records of `resamples` draws with replacement, in chunks."""
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS // num_records)
    for start in range(0, resamples, rows):
        yield rng.integers(0, num_records, (min(rows, resamples - start), num_records))


def _all_but_one(num_records: int) -> Iterator[np.ndarray]:
    """Yield the counts of every draw that leaves one record out, in chunks."""
    rows = max(1, _DRAWS // num_records)
    for start in range(0, num_records, rows):
        end = min(start + rows, num_records)
        counts = np.ones((end - start, num_records))
        counts[np.arange(end - start), np.arange(start, end)] = 0.0
        yield counts
