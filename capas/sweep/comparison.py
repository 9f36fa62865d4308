"""Compare the settings of a sweep by trials with the same seeds and records, as all of them were looked at.

Whoever picks the best of many settings picks a lucky one: its mean is too good, and a test of two settings is
wrong more often than it says. Here all statements hold together, with the confidence of one:

- A setting may be the best unless another one is shown to be better; the best is shown to be so if it beats
  all (Tukey's studentized range; Kramer 1956, "Extension of multiple range tests to group means with unequal
  numbers of replications", Biometrics 12). Hsu's comparison with the best needs less, but calls equals worse.
- A setting is better than the default if it is after as many comparisons as there are settings (Dunnett 1955,
  "A multiple comparison procedure for comparing several treatments with a control", JASA 50).

A score is taken as mean + setting + seed + record + setting x seed + setting x record + noise, with seeds and
records drawn at random. What a seed or a record does to all settings does not count: both are blocks. Of the
variance of a difference there are then two sources (Owen 2007, "The pigeonhole bootstrap", Annals of Applied
Statistics 1, has the same two for such a table):

- seeds: another seed would favour another setting. Estimated by the trials, pooled over the settings, except
  over those that scatter far more than the others, as too high a learning rate does.
- records: other records would favour another setting. Estimated for each two settings by the differences of
  their scores, record by record.

An interval's half width is the root of the sum of both, (quantile x standard error) squared, each with the
quantile of its own degrees of freedom (Banerjee 1961, "On confidence interval for two-means problem based on
separate estimates of variances and tables of t-distribution", Sankhya A 23). The noise is in both and taken
out once. No interval is narrower than one by seeds alone, or by records alone. With one seed only the second
source is known: what is shown holds for these trained models.
`benchmarks/sweep_winner.py` simulates how often each statement is wrong.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import chi2

from capas.sweep.quantiles import (
    Array,
    correlated_critical_value,
    critical_value,
    range_value,
    root,
    shift_to_detect,
)

_RARE = 1e-4  # a variance that is this improbable beside the others is the setting's own
_MAX_SEEDS = 1000  # that anybody would run


@dataclass(frozen=True)
class Source:
    """What another sweep would draw anew, seeds or records, and what that does to the settings' means.

    Attributes:
        covariance: [settings, settings], of the means.
        variances: [settings, settings], of the difference of each two means.
        degrees: degrees of freedom of these estimates.
    """

    covariance: Array
    variances: Array
    degrees: int
    is_pooled: bool

    def better(self, default: int, confidence: float, num_dropped: int = 0) -> float:
        """Return the quantile of the largest difference from the default, in standard errors."""
        others = [row for row in range(len(self.covariance)) if row != default]
        if self.is_pooled or num_dropped:  # of those dropped no covariance is known
            return critical_value(len(others) + num_dropped, self.degrees, confidence)
        away = self.covariance[others] - self.covariance[default]
        differences = away[:, others] - away[:, [default]]
        return correlated_critical_value(differences, self.degrees, confidence)

    def worse(self, confidence: float, num_dropped: int = 0) -> float:
        """Return the quantile of the largest difference of any two settings, in standard errors."""
        return range_value(len(self.covariance) + num_dropped, self.degrees, confidence)

    def unbiased(self) -> "Source":
        """Return the source with variances of which half the sweeps would estimate more, half less.

        A variance is mostly estimated too small, of few trials by far.
        """
        scale = self.degrees / float(chi2.median(self.degrees))
        return replace(self, variances=self.variances * scale)


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
        means, covariance: of the settings.
        num_seeds: 1 if nothing is known of other seeds.
        num_records: 0 if nothing is known of other records.
        error_of_one: the standard deviation of a single trial by its seed, of the best setting and the
            default together, from `Source.unbiased`; 0.0 if nothing is known of other seeds.
        detectable_by_records: the gain that could be shown on these records with endless seeds.
    """

    may_be_best: list[bool]
    best: int
    is_best: bool
    means: Array
    covariance: Array
    num_seeds: int
    num_records: int
    gain: float | None = None
    least_gain: float | None = None
    detectable: float | None = None
    error_of_one: float = 0.0
    detectable_by_records: float = 0.0

    @property
    def optimism(self) -> float:
        """Return by how much the best mean is too good, on average, because it was picked: a bootstrap."""
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((2_000, len(self.means))) @ root(self.covariance).T
        picked = (self.means + noise).argmax(axis=1)
        return float(noise[np.arange(len(noise)), picked].mean())


def compare(
    values: Array,
    default: int | None = None,
    confidence: float = 0.95,
    records: Array | None = None,
    degrees: int | None = None,
    num_dropped: int = 0,
) -> Comparison:
    """Compare settings.

    Args:
        values: [settings, seeds], at least two settings; more is better.
        default: the row of the default setting, if it is among them.
        records: [settings, seeds, records], of which `values` are the means; needed if there is one seed.
        degrees: degrees of freedom of a variance over the records, fewer than records - 1 if a few of them
            decide.
        num_dropped: settings that were looked at, too, and dropped before their end: they count as looks.
    """
    num_settings, num_seeds = values.shape
    sources = [seed_source(values)] if num_seeds > 1 else []
    sources += [] if records is None else [record_source(records, degrees)]
    noise = np.zeros((num_settings, num_settings))
    if len(sources) > 1 and records is not None:
        noise = noise_covariance(records)
    means = values.mean(axis=1)
    margins = half_widths(
        sources, [source.worse(confidence, num_dropped) for source in sources], noise
    )
    differences = means[:, None] - means[None, :]
    others = ~np.eye(num_settings, dtype=bool)
    above = np.where(others, differences + margins, np.inf).min(axis=1)
    below = np.where(others, differences - margins, np.inf).min(axis=1)
    best = int(means.argmax())
    against: dict[str, float] = {}
    if default is not None:
        better = [source.better(default, confidence, num_dropped) for source in sources]
        pair = best if best != default else int(below.argmin()), default
        against = _detectable(sources, better, noise, pair, num_seeds)
        if best != default:
            gain = float(differences[pair])
            margin = float(half_widths(sources, better, noise)[pair])
            against |= {"gain": gain, "least_gain": gain - margin}
    return Comparison(
        may_be_best=(above >= 0).tolist(),
        best=best,
        is_best=bool(below[best] > 0),
        means=means,
        covariance=np.sum([source.covariance for source in sources], axis=0) - noise,
        num_seeds=num_seeds,
        num_records=0 if records is None else records.shape[2],
        **against,
    )


def _detectable(
    sources: list[Source],
    better: list[float],
    noise: Array,
    pair: tuple[int, int],
    num_seeds: int,
) -> dict[str, float]:
    """Return what could have been shown of the difference of two settings: attributes of `Comparison`.

    Args:
        better: the quantile of each source.
        num_seeds: if more than one, the first source is the seeds'; any other source is the records'.
    """

    sources = [source.unbiased() for source in sources]

    def reached(sources: list[Source], better: list[float], noise: Array) -> float:
        beyond = half_widths(sources, to_detect(sources, better), noise)[pair]
        return float(half_widths(sources, better, noise)[pair] + beyond)

    by_seeds, none = sources[: int(num_seeds > 1)], np.zeros_like(noise)
    of_records = slice(len(by_seeds), None)
    found = {"detectable": reached(sources, better, noise)}
    if by_seeds:
        found["error_of_one"] = float(np.sqrt(by_seeds[0].variances[pair] * num_seeds / 2))
    if sources[of_records]:
        found["detectable_by_records"] = reached(sources[of_records], better[of_records], none)
    return found


def half_widths(sources: list[Source], quantiles: list[float], noise: Array) -> Array:
    """Return half the width of each difference's interval, [settings, settings].

    Args:
        noise: covariance of the means that all sources hold.
    """
    squares = [
        quantile**2 * source.variances for source, quantile in zip(sources, quantiles, strict=True)
    ]
    together = np.sum(squares, axis=0) - min(quantiles) ** 2 * of_differences(noise)
    widths: Array = np.sqrt(np.max([together, *squares], axis=0))
    return widths


def to_detect(sources: list[Source], better: list[float]) -> list[float]:
    """Return by how many standard errors a true gain must exceed `better` to be shown in 80 % of sweeps."""
    return [
        shift_to_detect(quantile, source.degrees) - quantile
        for source, quantile in zip(sources, better, strict=True)
    ]


def seed_source(values: Array) -> Source:
    """Return what the seeds do to the settings' means.

    Args:
        values: [settings, seeds], at least 2 x 2.
    """
    variances, degrees = trial_variances(values)
    covariance = np.diag(variances / values.shape[1])
    return Source(covariance, of_differences(covariance), degrees, is_pooled=True)


def record_source(records: Array, degrees: int | None = None) -> Source:
    """Return what the records do to the settings' means.

    Args:
        records: [settings, seeds, records].
        degrees: see `compare`.
    """
    num_records = records.shape[2]
    means = interaction(records.mean(axis=1))
    covariance = means @ means.T / ((num_records - 1) * num_records)
    variances = np.clip(of_differences(covariance), 0, None)
    return Source(covariance, variances, degrees or num_records - 1, is_pooled=False)


def noise_covariance(records: Array) -> Array:
    """Return the covariance of the settings' means by what is of one trial and one record alone.

    Args:
        records: [settings, seeds, records], with at least two seeds.
    """
    num_settings, num_seeds, num_records = records.shape
    over_seeds = records - records.mean(axis=1, keepdims=True)
    noise = over_seeds - over_seeds.mean(axis=2, keepdims=True)
    flat = (noise - noise.mean(axis=0)).reshape(num_settings, -1)
    degrees = (num_seeds - 1) * (num_records - 1)
    found: Array = flat @ flat.T / (degrees * num_seeds * num_records)
    return found


def interaction(table: Array) -> Array:
    """Return a table less what each row has in all columns, and each column in all rows."""
    found: Array = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    return found


def of_differences(covariance: Array) -> Array:
    """Return the variance of the difference of each two means."""
    own = np.diag(covariance)
    found: Array = own[:, None] + own[None, :] - 2 * covariance
    return found


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
    degrees = (len(alike) - 1) * (num_seeds - 1)
    if degrees == 0:  # one setting alone scatters little
        return own, num_seeds - 1
    pooled = float((interaction(alike) ** 2).sum() / degrees)
    return np.where(usual, pooled, own), degrees


def seeds_to_show(gain: float, found: Comparison, confidence: float = 0.95) -> int | None:
    """Return how many seeds would show a gain over the default in 80 % of sweeps; None if over a thousand.

    None, too, if nothing is known of other seeds. The records stay: no number of seeds may suffice.

    Args:
        found: a comparison with a default; its variances are taken as they are.
    """
    if found.detectable is None or found.num_seeds < 2 or gain <= 0:
        return None
    settings = len(found.means)

    def detectable(seeds: int) -> float:
        degrees = (settings - 1) * (seeds - 1)
        critical = critical_value(settings - 1, degrees, confidence)
        by_seeds = found.error_of_one * math.sqrt(2 / seeds) * shift_to_detect(critical, degrees)
        return math.hypot(by_seeds, found.detectable_by_records)

    if detectable(_MAX_SEEDS) > gain:
        return None
    return 2 + bisect_left(range(2, _MAX_SEEDS), True, key=lambda seeds: detectable(seeds) <= gain)
