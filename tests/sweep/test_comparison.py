"""A winner that is one: how often what a sweep says is wrong, simulated, and values computed by hand."""

import numpy as np
import pytest
from scipy.stats import dunnett, tukey_hsd

from capas.sweep.comparison import compare, trial_variances
from capas.sweep.quantiles import critical_value, range_value

SIMULATIONS = 1_000
CHANCE = 3 * np.sqrt(0.05 * 0.95 / SIMULATIONS)  # three standard errors of a rate of 5 %


def noise(rng: np.random.Generator, num_settings: int, num_seeds: int) -> np.ndarray:
    """Scores of settings that are all alike: noise of each trial, and what a seed does to all of them."""
    by_seed = 2 * rng.standard_normal(num_seeds)
    return rng.standard_normal((num_settings, num_seeds)) + by_seed


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_of_twenty_settings_without_effect_hardly_any_is_promoted(num_seeds: int) -> None:
    rng, promoted, worse, best = np.random.default_rng(0), 0, 0, 0
    for _ in range(SIMULATIONS):
        found = compare(noise(rng, 21, num_seeds), default=0)
        promoted += found.least_gain is not None and found.least_gain > 0
        worse += not all(found.may_be_best)
        best += found.is_best
    assert promoted / SIMULATIONS <= 0.05 + CHANCE
    assert worse / SIMULATIONS <= 0.05 + CHANCE
    assert best / SIMULATIONS <= 0.05


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_a_gain_of_the_size_that_can_be_shown_is_kept(num_seeds: int) -> None:
    rng, kept = np.random.default_rng(1), 0
    seen = [compare(noise(rng, 21, num_seeds), default=0).detectable for _ in range(200)]
    gain = float(np.median([value for value in seen if value is not None]))
    for _ in range(SIMULATIONS):
        scores = noise(rng, 21, num_seeds)
        scores[7] += gain
        found = compare(scores, default=0)
        kept += found.best == 7 and found.least_gain is not None and found.least_gain > 0
    assert kept / SIMULATIONS >= 0.8 - 3 * np.sqrt(0.8 * 0.2 / SIMULATIONS)


def test_a_setting_that_scatters_hides_no_gain_of_the_others() -> None:
    """As the trials of a learning rate that is too high do."""
    rng = np.random.default_rng(2)
    scores = noise(rng, 5, 3)
    scores[3] += 9
    calm = compare(scores, default=0)
    wild = compare(np.vstack([scores, 200 * rng.standard_normal(3) - 500]), default=0)
    assert calm.least_gain is not None and wild.least_gain is not None
    assert wild.best == 3 and wild.least_gain > 0.8 * calm.least_gain > 0
    assert not wild.may_be_best[5]


def test_quantiles_are_those_of_the_tests_that_they_come_from() -> None:
    """As scipy has them, for independent groups: 4 groups of 6, so 20 degrees of freedom."""
    rng = np.random.default_rng(3)
    control, *groups = rng.standard_normal((4, 6))
    mean = np.sqrt(np.mean([group.var(ddof=1) for group in (control, *groups)]) * 2 / 6)
    found = dunnett(*groups, control=control, alternative="greater", rng=0).confidence_interval(
        0.95
    )
    differences = np.array([group.mean() - control.mean() for group in groups])
    assert critical_value(3, 20, 0.95) == pytest.approx(
        (differences - found.low)[0] / mean, rel=0.01
    )
    whole = tukey_hsd(control, *groups).confidence_interval(0.95)
    half = (whole.high - whole.low)[0, 1] / 2
    assert range_value(4, 20, 0.95) == pytest.approx(half / mean, rel=1e-3)


def test_what_a_seed_does_to_all_settings_does_not_count() -> None:
    variances, degrees = trial_variances(np.array([[1.0, 5.0, 9.0], [2.0, 6.0, 10.0]]))
    assert variances == pytest.approx([0, 0]) and degrees == 2
    found = compare(np.array([[1.0, 5.0, 9.0], [2.0, 6.0, 10.0]]), default=0)
    assert (found.best, found.is_best, found.gain) == (1, True, 1.0)


def test_the_best_of_equals_is_too_good() -> None:
    """By 0.56 standard errors of a mean for the best of two equal ones."""
    scores = np.array([[0.0, 2.0], [2.0, 0.0]])
    (variance, _), _ = trial_variances(scores)
    error = np.sqrt(variance / 2)
    assert compare(scores).optimism == pytest.approx(0.564 * error, rel=0.05)


def test_the_default_may_be_the_best() -> None:
    found = compare(noise(np.random.default_rng(4), 4, 3) + 5 * np.eye(4)[:, :1], default=0)
    assert found.best == 0 and found.gain is None and found.least_gain is None
    assert found.detectable is not None and found.detectable > 0
