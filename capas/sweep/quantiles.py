"""Compute how large the largest of many differences is by chance, in standard errors."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import nct, studentized_range

POWER = 0.8  # of `shift_to_detect`
_DRAWS = 100_000
_CORRELATED_DRAWS = 20_000
Array = NDArray[np.float64]


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


def correlated_critical_value(covariance: Array, degrees: int, confidence: float) -> float:
    """Return the same quantile for differences with an estimated covariance, by simulation.

    Args:
        covariance: [others, others], of the differences from one setting.

    Source: Hothorn, Bretz and Westfall 2008, "Simultaneous inference in general parametric models",
    Biometrical Journal 50.
    """
    deviations = np.sqrt(np.diag(covariance))
    scales = np.where(deviations > 0, deviations, 1)  # a difference without variance is never large
    draws, chi = _standard_draws(len(covariance), degrees)
    differences = draws @ root(covariance / np.outer(scales, scales)).T
    return float(np.quantile(differences.max(axis=1) / chi, confidence))


@lru_cache(maxsize=8)
def _standard_draws(num_others: int, degrees: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    chi = np.sqrt(rng.chisquare(degrees, _CORRELATED_DRAWS) / degrees)
    return rng.standard_normal((_CORRELATED_DRAWS, num_others)), chi


def root(covariance: Array) -> Array:
    """Return R with R R' = covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    found: Array = vectors * np.sqrt(np.clip(values, 0, None))
    return found


@lru_cache(maxsize=256)
def range_value(num_settings: int, degrees: int, confidence: float) -> float:
    """Return the quantile of the largest difference of any two settings, in its standard errors."""
    return float(studentized_range.ppf(confidence, num_settings, degrees) / np.sqrt(2))


@lru_cache(maxsize=256)
def shift_to_detect(critical: float, degrees: int) -> float:
    """Return the true difference, in standard errors, that exceeds `critical` in 80 % of samples."""
    return float(brentq(lambda shift: nct.sf(critical, degrees, shift) - POWER, 0, critical + 20))
