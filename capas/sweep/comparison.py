"""Compare the settings of a sweep by trials with the same seeds, as all of them were looked at.

Whoever picks the best of many settings picks a lucky one: its mean is too good, and a test of two settings is
wrong more often than it says. Here all statements hold together, with the confidence of one:

- A setting may be the best unless another one is shown to be better; the best is shown to be so if it beats
  all (Tukey's studentized range; Kramer 1956, "Extension of multiple range tests to group means with unequal
  numbers of replications", Biometrics 12). Hsu's comparison with the best needs less, but calls equals worse.
- A setting is better than the default if it is after as many comparisons as there are settings (Dunnett 1955,
  "A multiple comparison procedure for comparing several treatments with a control", JASA 50).

The seeds are blocks: what a seed does to all settings does not count. The variance that is left is pooled
over the settings, except over those that scatter far more than the others, as too high a learning rate does.
`benchmarks/sweep_winner.py` simulates how often each statement is wrong.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import chi2, nct, studentized_range

POWER = 0.8  # of `detectable`
_RARE = 1e-4  # a variance that is this improbable beside the others is the setting's own
_DRAWS = 100_000
_MAX_SEEDS = 1000  # that anybody would run
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """The result of comparing settings; a difference is positive where more is better.

    Attributes:
        may_be_best: for each setting, whether none of the others is shown to be better.
        best: the setting with the best mean.
        is_best: whether it is shown to be better than every other one.
        gain: its mean less that of the default; None without a default, or if it is the default.
        least_gain: the lower end of the gain's one-sided interval.
        detectable: the gain over the default that would have been shown in 80 % of such sweeps.
        means, errors: of the settings, with the standard errors of the means.
        error_of_one: the standard deviation of a single trial, of the best setting and the default together.
    """

    may_be_best: list[bool]
    best: int
    is_best: bool
    gain: float | None
    least_gain: float | None
    detectable: float | None
    means: Array
    errors: Array
    error_of_one: float = 0.0

    @property
    def optimism(self) -> float:
        """Return by how much the best mean is too good, on average, because it was picked: a bootstrap."""
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((2_000, len(self.means))) * self.errors
        picked = (self.means + noise).argmax(axis=1)
        return float(noise[np.arange(len(noise)), picked].mean())


def compare(values: Array, default: int | None = None, confidence: float = 0.95) -> Comparison:
    """Compare settings.

    Args:
        values: [settings, seeds], at least 2 x 2; more is better.
        default: the row of the default setting, if it is among them.
    """
    num_settings, num_seeds = values.shape
    means, (variances, degrees) = values.mean(axis=1), trial_variances(values)
    worse = range_value(num_settings, degrees, confidence)
    better = critical_value(num_settings - 1, degrees, confidence)
    errors = np.sqrt((variances[:, None] + variances[None, :]) / num_seeds)
    differences = means[:, None] - means[None, :]
    others = ~np.eye(num_settings, dtype=bool)
    above = np.where(others, differences + worse * errors, np.inf).min(axis=1)
    below = np.where(others, differences - worse * errors, np.inf).min(axis=1)
    best = int(means.argmax())
    gain = least = detectable = None
    error = 0.0
    if default is not None:
        error = float(errors[best if best != default else int(below.argmin()), default])
        detectable = error * shift_to_detect(better, degrees)
        if best != default:
            gain = float(differences[best, default])
            least = gain - better * error
    return Comparison(
        may_be_best=(above >= 0).tolist(),
        best=best,
        is_best=bool(below[best] > 0),
        gain=gain,
        least_gain=least,
        detectable=detectable,
        means=means,
        errors=np.sqrt(variances / num_seeds),
        error_of_one=error * math.sqrt(num_seeds / 2),
    )


def trial_variances(values: Array) -> tuple[Array, int]:
    """Return the variance of a single trial of each setting, and the degrees of freedom of their estimate.

    Args:
        values: [settings, seeds].
    """
    num_seeds = values.shape[1]
    own = values.var(axis=1, ddof=1)
    odd = chi2.isf(_RARE, num_seeds - 1) / chi2.median(num_seeds - 1)
    usual = own <= odd * np.median(own)
    alike = values[usual]
    residuals = alike - alike.mean(axis=1, keepdims=True) - alike.mean(axis=0) + alike.mean()
    degrees = (len(alike) - 1) * (num_seeds - 1)
    if degrees == 0:  # one setting alone scatters little
        return own, num_seeds - 1
    pooled = float((residuals**2).sum() / degrees)
    return np.where(usual, pooled, own), degrees


def seeds_to_show(gain: float, found: Comparison, confidence: float = 0.95) -> int | None:
    """Return how many seeds would show a gain over the default in 80 % of sweeps; None if over a thousand.

    Args:
        found: a comparison with a default; its variances are taken as they are.
    """
    if found.detectable is None or gain <= 0:
        return None
    settings = len(found.means)

    def detectable(seeds: int) -> float:
        degrees = (settings - 1) * (seeds - 1)
        critical = critical_value(settings - 1, degrees, confidence)
        return found.error_of_one * float(np.sqrt(2 / seeds)) * shift_to_detect(critical, degrees)

    if detectable(_MAX_SEEDS) > gain:
        return None
    return 2 + bisect_left(range(2, _MAX_SEEDS), True, key=lambda seeds: detectable(seeds) <= gain)


@lru_cache(maxsize=256)
def critical_value(num_others: int, degrees: int, confidence: float) -> float:
    """Return the quantile of the largest of `num_others` differences from one setting, in standard errors.

    It is that of Dunnett's one-sided test with equal variances, by simulation with a fixed seed.
    """
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((_DRAWS, num_others + 1))
    largest = (draws[:, 1:] - draws[:, :1]).max(axis=1) / np.sqrt(2)
    scale = np.sqrt(rng.chisquare(degrees, _DRAWS) / degrees)
    return float(np.quantile(largest / scale, confidence))


@lru_cache(maxsize=256)
def range_value(num_settings: int, degrees: int, confidence: float) -> float:
    """Return the quantile of the largest difference of any two settings, in its standard errors."""
    return float(studentized_range.ppf(confidence, num_settings, degrees) / np.sqrt(2))


@lru_cache(maxsize=256)
def shift_to_detect(critical: float, degrees: int) -> float:
    """Return the true difference, in standard errors, that exceeds `critical` in 80 % of samples."""
    return float(brentq(lambda shift: nct.sf(critical, degrees, shift) - POWER, 0, critical + 20))
