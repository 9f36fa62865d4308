"""Compute how large the largest of many differences is by chance, in standard errors."""

from functools import lru_cache

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import chi2, nct, norm, qmc, studentized_range

POWER = 0.8  # of `shift_to_detect`
_LOG2_DRAWS = 15  # the quantile is then within 1 % with 2 degrees of freedom, within 0.3 % with 40
_NUM_NODES = 150
_LARGEST = 1e6  # standard errors
Array = NDArray[np.float64]


@lru_cache(maxsize=256)
def critical_value(num_others: int, degrees: int, confidence: float) -> float:
    """Return the quantile of the largest of `num_others` differences from one setting, in standard errors.

    It is that of Dunnett's one-sided test with equal variances: an integral over the one setting's error and
    the estimated standard error, by Gauss' rules.
    """
    errors, weights, quantiles, steps = _nodes()
    scales = np.sqrt(chi2.ppf((quantiles + 1) / 2, degrees) / degrees)

    def missed(critical: float) -> float:
        below = norm.cdf(critical * np.sqrt(2) * scales[:, None] + errors) ** num_others
        return float(steps / 2 @ below @ weights / weights.sum()) - confidence

    return float(brentq(missed, 0, _LARGEST))


@lru_cache(maxsize=1)
def _nodes() -> tuple[Array, Array, Array, Array]:
    return (*hermegauss(_NUM_NODES), *leggauss(_NUM_NODES))


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
    """Return draws of standard errors and of the scale of their estimate, evenly spread (Sobol)."""
    uniform = qmc.Sobol(num_others + 1, seed=0).random_base2(_LOG2_DRAWS)
    chi = np.sqrt(chi2.ppf(uniform[:, 0], degrees) / degrees)
    return norm.ppf(uniform[:, 1:]), chi


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
