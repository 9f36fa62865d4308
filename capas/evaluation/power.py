"""Compute what a test split of a given size can show, before anything is measured."""

import math
from statistics import NormalDist

SPREAD = 0.5  # assumed standard deviation of paired differences of scores from 0 to 1
CONFIDENCE_FRACTION = 0.95
POWER_FRACTION = 0.8  # how often a difference of the given size is found
TARGET = 0.05  # the difference used as an example


def quantiles(confidence_fraction: float, power_fraction: float) -> float:
    """Return z_c + z_p: the normal quantiles of (1 + confidence) / 2 and of the power, added."""
    return sum(map(NormalDist().inv_cdf, ((1 + confidence_fraction) / 2, power_fraction)))


def smallest_difference(num_records: int) -> float:
    """Return the smallest difference of two models that `num_records` test records show in 80 % of the cases.

    (z_c + z_p) x sd / sqrt(n) with 95 % confidence and an assumed standard deviation of 0.5, as in
    `capas.evaluation.comparison.records_needed`, which uses the measured one.
    """
    return quantiles(CONFIDENCE_FRACTION, POWER_FRACTION) * SPREAD / math.sqrt(num_records)


def records_for(difference: float) -> int:
    """Return how many test records show a difference of this size in 80 % of the cases."""
    needed = quantiles(CONFIDENCE_FRACTION, POWER_FRACTION) * SPREAD / difference
    return math.ceil(needed**2)


def power_in_words(num_records: int) -> str:
    """Return a sentence: which difference cannot be shown, and how many records would show 5 points."""
    points = 100 * smallest_difference(num_records)
    sentence = (
        f"{num_records} test records: a difference below about {points:.0f} points cannot be shown"
    )
    needed = records_for(TARGET)
    more = f"; about {needed} would show one of {100 * TARGET:.0f}" if num_records < needed else ""
    return sentence + more
