"""A winner that is one: how often what a sweep says is wrong, simulated, and values computed by hand."""

import math

import numpy as np
import pytest
from scipy.stats import dunnett, t, tukey_hsd

from capas.sweep.comparison import (
    Comparison,
    Source,
    compare,
    half_widths,
    noise_covariance,
    of_differences,
    record_source,
    seed_source,
    trial_variances,
)
from capas.sweep.quantiles import (
    correlated_critical_value,
    critical_value,
    range_value,
    shift_to_detect,
)

SIMULATIONS = 1_000
OF_RECORDS = 200
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


@pytest.mark.parametrize(("degrees", "confidence"), [(1, 0.95), (1, 0.9999), (4, 0.6), (60, 0.99)])
def test_of_two_settings_the_quantile_is_students(degrees: int, confidence: float) -> None:
    exact = t.ppf(confidence, degrees)
    assert critical_value(1, degrees, confidence) == pytest.approx(exact, rel=1e-3)


def test_with_few_seeds_half_the_sweeps_say_less_than_could_be_shown() -> None:
    """The scores of two settings differ by a standard error of sqrt(2 / 3); 2 degrees of freedom."""
    rng = np.random.default_rng(8)
    found = [compare(rng.standard_normal((2, 3)), default=0).detectable for _ in range(2000)]
    shift = shift_to_detect(critical_value(1, 2, 0.95), 2)
    assert np.median(found) == pytest.approx(math.sqrt(2 / 3) * shift, rel=0.05)


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


def table(
    rng: np.random.Generator, num_seeds: int, num_records: int, by_seed: float = 1.0
) -> np.ndarray:
    """Scores [21, seeds, records] of settings that are all alike; a seed and a record favour some by chance.

    What seeds and records do to all settings is three times as much.
    """
    found = rng.standard_normal((21, num_seeds, num_records))
    found += rng.standard_normal((21, 1, num_records))
    found += by_seed / np.sqrt(num_records) * rng.standard_normal((21, num_seeds, 1))
    return np.asarray(found + 3 * rng.standard_normal((num_seeds, num_records)))


def of_records(scores: np.ndarray) -> Comparison:
    return compare(scores.mean(axis=2), default=0, records=scores)


def is_promoted(found: Comparison) -> bool:
    return found.least_gain is not None and found.least_gain > 0


@pytest.mark.parametrize(("num_seeds", "num_records"), [(2, 50), (3, 200)])
def test_on_other_seeds_and_records_hardly_any_of_twenty_without_effect_is_promoted(
    num_seeds: int, num_records: int
) -> None:
    rng, chance = np.random.default_rng(5), 3 * np.sqrt(0.05 * 0.95 / OF_RECORDS)
    tables = [table(rng, num_seeds, num_records) for _ in range(OF_RECORDS)]
    both = [of_records(scores) for scores in tables]
    seeds = [compare(scores.mean(axis=2), default=0) for scores in tables]
    assert np.mean([is_promoted(found) for found in both]) <= 0.05 + chance
    assert np.mean([not all(found.may_be_best) for found in both]) <= 0.05 + chance
    assert np.mean([is_promoted(found) for found in seeds]) > 0.15  # which another test set undoes
    assert all(found.num_records == num_records for found in both)


def test_with_one_seed_the_models_are_judged_and_not_the_settings() -> None:
    rng, chance = np.random.default_rng(6), 3 * np.sqrt(0.05 * 0.95 / OF_RECORDS)
    alike = [of_records(table(rng, 1, 100, by_seed=0)) for _ in range(OF_RECORDS)]
    assert np.mean([is_promoted(found) for found in alike]) <= 0.05 + chance
    moved = [of_records(table(rng, 1, 100, by_seed=3)) for _ in range(OF_RECORDS)]
    assert np.mean([is_promoted(found) for found in moved]) > 0.3  # as another seed would undo
    assert alike[0].num_seeds == 1


def test_a_gain_that_seeds_and_records_can_show_is_kept() -> None:
    rng, kept = np.random.default_rng(7), 0
    seen = [of_records(table(rng, 3, 100)).detectable for _ in range(100)]
    gain = float(np.median([value for value in seen if value is not None]))
    for _ in range(OF_RECORDS):
        scores = table(rng, 3, 100)
        scores[7] += gain
        found = of_records(scores)
        kept += found.best == 7 and is_promoted(found)
    assert kept / OF_RECORDS >= 0.8 - 3 * np.sqrt(0.8 * 0.2 / OF_RECORDS)


def test_records_of_one_seed_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, variance 1, standard error 1 / sqrt(3), 2 degrees of freedom."""
    scores = np.array([[[5.0, 1.0, 9.0]], [[6.0, 3.0, 12.0]]])
    source = record_source(scores)
    assert source.variances == pytest.approx(np.array([[0, 1 / 3], [1 / 3, 0]]))
    assert source.degrees == 2
    found = of_records(scores)
    assert found.gain == pytest.approx(2)
    assert found.least_gain == pytest.approx(2 - 2.920 / np.sqrt(3), abs=0.05)  # t of 2 at 95 %
    assert found.may_be_best == [True, True]  # two-sided: 4.303 / sqrt(3) is more than 2


def test_noise_is_counted_once() -> None:
    """The second setting is better by 3, -1 and by 1, -3 on two records: 2, -2 by record, 1, -1 by seed."""
    scores = np.array([[[0.0, 0.0], [0.0, 0.0]], [[3.0, -1.0], [1.0, -3.0]]])
    seeds, records = seed_source(scores.mean(axis=2)), record_source(scores)
    assert seeds.variances[0, 1] == pytest.approx(2 / 2)  # variance of 1, -1, of 2 seeds
    assert records.variances[0, 1] == pytest.approx(8 / 2)
    assert noise_covariance(scores) == pytest.approx(0)
    width = half_widths([seeds, records], [2, 3], np.zeros((2, 2)))[0, 1]
    assert width == pytest.approx(np.sqrt(4 * 1 + 9 * 4))
    turned = np.array([[[0.0, 0.0], [0.0, 0.0]], [[1.0, -1.0], [-1.0, 1.0]]])  # noise alone
    assert record_source(turned).variances[0, 1] == 0
    noise = noise_covariance(turned)
    assert of_differences(noise)[0, 1] == pytest.approx(4 / 4)  # variance 4 of 2 x 2
    width = half_widths([seeds, records], [2, 3], noise)[0, 1]
    assert width == pytest.approx(np.sqrt(4 * 1 + 9 * 4 - 4 * 1))
    width = half_widths([seeds, records], [2, 3], 100 * noise)[0, 1]
    assert width == pytest.approx(3 * 2)  # never less than by records alone


def test_records_never_make_an_interval_narrower() -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        scores = table(rng, 2, 50)
        both, seeds = of_records(scores), compare(scores.mean(axis=2), default=0)
        assert both.detectable is not None and seeds.detectable is not None
        assert both.detectable >= seeds.detectable
        assert sum(both.may_be_best) >= sum(seeds.may_be_best)


def test_settings_that_score_every_record_alike_differ_by_nothing() -> None:
    scores = np.repeat(np.random.default_rng(9).standard_normal((1, 1, 30)), 3, axis=0)
    found = of_records(scores)
    assert found.may_be_best == [True, True, True]
    assert found.detectable == 0 and found.optimism == pytest.approx(0, abs=1e-15)


def test_equally_correlated_differences_have_the_quantile_of_dunnett() -> None:
    covariance = 4 * (np.eye(20) + 1) / 2
    found = correlated_critical_value(covariance, 40, 0.95)
    assert found == pytest.approx(critical_value(20, 40, 0.95), rel=0.005)
    alone = correlated_critical_value(np.diag([4.0] * 20), 10_000, 0.95)
    assert alone == pytest.approx(2.80, rel=0.02)  # of 20 independent ones: 0.95 ** (1 / 20)


def test_settings_that_were_dropped_before_count_as_looked_at() -> None:
    """Two settings are left of nine: what is shown of them must withstand nine looks."""
    rng = np.random.default_rng(0)
    values = np.array([[1.0], [0.0]]) + 0.1 * rng.standard_normal((2, 3))
    records = values[:, :, None] + rng.standard_normal((2, 3, 50))
    records += (values - records.mean(axis=2))[:, :, None]
    for more in ({}, {"records": records}):
        alone = compare(values, default=1, **more)
        dropped = compare(values, default=1, num_dropped=7, **more)
        assert alone.least_gain is not None and dropped.least_gain is not None
        assert dropped.least_gain < alone.least_gain
        assert dropped.gain == alone.gain
    assert Source(np.eye(2), np.ones((2, 2)), 2, is_pooled=True).better(
        1, 0.95, 7
    ) == critical_value(8, 2, 0.95)
