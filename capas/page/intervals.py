"""Confidence intervals of a share."""

import math
from statistics import NormalDist


def wilson_interval(num_right: float, num_records: int, confidence: float) -> tuple[float, float]:
    """Wilson score interval of a binomial share: within [0, 1], around the share, and honest at 0 and at 1.

    Args:
        num_right: how many of `num_records` are right.
        confidence: for example 0.95.

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
    # Rounding may leave a share of 0 or 1 outside of its own interval by 1e-16.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
