"""Compute confidence intervals of a mean over records."""

import math
from collections.abc import Sequence
from statistics import NormalDist

from capas.evaluation.comparison import paired_difference


def mean_interval(
    scores: Sequence[float], confidence: float, resamples: int
) -> tuple[float, float]:
    """Return the interval of a mean: Wilson's if each score is 0 or 1, otherwise a bootstrap interval.

    Args:
        scores: [records], at least one.
        confidence: for example 0.95.
        resamples: bootstrap resamples.

    Source: `capas.evaluation.comparison.paired_difference`.
    """
    if all(score in (0, 1) for score in scores):
        return wilson_interval(sum(scores), len(scores), confidence)
    found = paired_difference(
        [0.0] * len(scores), scores, [1.0] * len(scores),
        resamples=resamples, confidence_fraction=confidence, seed=0,
    )  # fmt: skip
    return found["low"], found["high"]


def wilson_interval(num_right: float, num_records: int, confidence: float) -> tuple[float, float]:
    """Return the Wilson score interval of a binomial share: within [0, 1], and sound at 0 and at 1.

    Args:
        num_right: how many of `num_records` are right.
        confidence: for example 0.95.

    Raises:
        ValueError: there are no records.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22 (1927).
    """
    if num_records <= 0:
        raise ValueError("an interval needs at least one record")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, weight = num_right / num_records, z * z / num_records
    centre = (share + weight / 2) / (1 + weight)
    half = (
        z * math.sqrt(share * (1 - share) / num_records + weight / (4 * num_records)) / (1 + weight)
    )
    # Rounding may put an end of the interval on the wrong side of a share of 0 or 1.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
