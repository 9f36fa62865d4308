"""Simulate how often a sweep's ranking is wrong: `python benchmarks/sweep_winner.py`, 30 minutes of CPU time.

Settings without any effect: how often one is promoted over the default, one is called worse, one is called
the best. With one setting that is better by what the sweep says it could have shown: how often that one is
promoted.

- `seeds`: the scores are drawn with what a seed does to all settings; their records are not known. In the
  last column a tenth of the settings scatters eight times as much as the others, and is worse.
- `seeds and records`: each trial scores the same records, and each setting is a little better with some seeds
  and on some records, so that both are judged on new seeds and new records. For comparison, the same trials
  judged by their seeds alone.
- `one seed`: no seed favours a setting, so that its models are alike. `gain too large`: how often the gain
  of the trained models on all records is less than said, though seeds favour settings, too. `promoted, seeds
  favour settings`: how often a setting without effect is promoted because of its seed, which one seed cannot
  tell.
"""

import json
from dataclasses import replace

import machine
import numpy as np

from capas.sweep.comparison import compare
from capas.sweep.records import RecordScores, stacked

SIMULATIONS, OF_RECORDS = 5_000, 2_000
SHAPES = ((2, 3), (6, 3), (21, 2), (21, 3), (21, 5), (40, 3))  # settings with the default, seeds
SEEDS, RECORDS = (2, 3, 5), (50, 100, 200, 500)
SETTINGS = 21  # with the default, wherever there are records


def main() -> None:
    facts = {
        "simulations": {"seeds": SIMULATIONS, "with records": OF_RECORDS},
        "confidence": 0.95,
        "settings": SETTINGS,
        "seeds": {f"{n} settings, {seeds} seeds": rates(n, seeds) for n, seeds in SHAPES},
        "seeds and records": {
            f"{seeds} seeds, {number} records": rates_with_records(seeds, number)
            for seeds in SEEDS
            for number in RECORDS
        }
        | {
            f"3 seeds, {number} records, {kind}": rates_with_records(3, number, **kinds)
            for number in (50, 200)
            for kind, kinds in KINDS.items()
        },
        "one seed": {f"{number} records": rates_of_one_seed(number) for number in RECORDS}
        | {
            f"{number} records of unequal length": rates_of_one_seed(number, shape="lengths")
            for number in (50, 200)
        },
    }
    print(json.dumps({**facts, **machine.describe("numpy", "scipy")}, indent=2))


def rates(settings: int, seeds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    null = [compare(scores(rng, settings, seeds), 0) for _ in range(SIMULATIONS)]
    gain = float(np.median([found.detectable for found in null]))
    true = [compare(scores(rng, settings, seeds, gain), 0) for _ in range(SIMULATIONS)]
    wild = [compare(scores(rng, settings, seeds, wild=True), 0) for _ in range(SIMULATIONS)]
    return {
        "promoted without effect": rate(promoted(found) for found in null),
        "called worse without effect": rate(not all(found.may_be_best) for found in null),
        "called best without effect": rate(found.is_best for found in null),
        "a true gain promoted": rate(promoted(found) and found.best == 1 for found in true),
        "promoted without effect, some scatter": rate(promoted(found) for found in wild),
    }


def scores(rng, settings, seeds, gain=0.0, wild=False):
    found = rng.standard_normal((settings, seeds)) + 2 * rng.standard_normal(seeds)
    found[1] += gain
    if wild:
        found[-max(1, settings // 10) :] = (
            8 * rng.standard_normal((max(1, settings // 10), seeds)) - 30
        )
    return found


# By how much seeds and records favour settings, and the noise of a record's score: standard deviations.
# That of the seeds is multiplied by 1 / sqrt(records), so that none of the three vanishes beside the others.
KINDS = {
    "mostly the seeds vary": {"by_seed": 3.0},
    "mostly the records vary": {"by_seed": 0.0, "noise": 0.3},
    "mostly noise": {"by_seed": 0.0, "by_record": 0.3},
    "skewed scores": {"shape": "skewed"},
    "right or wrong": {"shape": "binary"},
    "records of unequal length": {"shape": "lengths"},
}


def rates_with_records(seeds: int, number: int, **kind) -> dict[str, float]:
    rng, null, alone = np.random.default_rng(0), [], []
    for _ in range(OF_RECORDS):
        trials = record_scores(rng, seeds, number, **kind)
        null.append(judged(trials))
        alone.append(compare(means(trials), 0))
    found = {
        "promoted without effect": rate(promoted(one) for one in null),
        "called worse without effect": rate(not all(one.may_be_best) for one in null),
        "promoted without effect by seeds alone": rate(promoted(one) for one in alone),
    }
    if kind.get("shape") == "binary":  # a gain is not a number to add
        return found
    gain = float(np.median([one.detectable for one in null]))
    true = [with_gain(rng, gain, seeds, number, **kind) for _ in range(OF_RECORDS)]
    return {**found, "a true gain promoted": rate(promoted(one) and one.best == 1 for one in true)}


def with_gain(rng, gain, seeds, number, **kind):
    trials = record_scores(rng, seeds, number, **kind)
    return judged([[with_sums(of, gain * of.weights) for of in trials[1]] if i == 1 else row
                   for i, row in enumerate(trials)])  # fmt: skip


def judged(trials):
    """Compare settings as a sweep does."""
    degrees = min(of.degrees for row in trials for of in row)
    return compare(means(trials), 0, records=stacked(trials), degrees=degrees)


def means(trials):
    return np.array([[of.mean for of in row] for row in trials])


def with_sums(of, more):
    return replace(of, sums=of.sums + more)


def rates_of_one_seed(number: int, **kind) -> dict[str, float]:
    rng = np.random.default_rng(0)
    alike = rates_of_models(rng, number, **kind)
    misled, too_large = [], []
    for _ in range(OF_RECORDS):
        by_seed = rng.standard_normal(SETTINGS) / np.sqrt(number)
        trials = record_scores(rng, 1, number, by_seed=0.0, **kind)
        pairs = zip(trials, by_seed, strict=True)
        one = judged([[with_sums(row[0], gain * row[0].weights)] for row, gain in pairs])
        misled.append(promoted(one))
        true = by_seed[one.best] - by_seed[0]
        too_large.append(one.least_gain is not None and one.least_gain > true)
    return {
        **alike,
        "gain too large": rate(too_large),
        "promoted, seeds favour settings": rate(misled),
    }


def rates_of_models(rng, number: int, **kind) -> dict[str, float]:
    kind = {"by_seed": 0.0, **kind}
    null = [judged(record_scores(rng, 1, number, **kind)) for _ in range(OF_RECORDS)]
    gain = float(np.median([one.detectable for one in null]))
    true = [with_gain(rng, gain, 1, number, **kind) for _ in range(OF_RECORDS)]
    return {
        "promoted without effect": rate(promoted(one) for one in null),
        "called worse without effect": rate(not all(one.may_be_best) for one in null),
        "a true gain promoted": rate(promoted(one) and one.best == 1 for one in true),
    }


def record_scores(rng, seeds, number, by_seed=1.0, by_record=1.0, noise=1.0, shape="normal"):
    """Trials [settings][seeds] of settings without effect."""
    draw = rng.standard_normal
    table = noise * draw((SETTINGS, seeds, number)) + by_record * draw((SETTINGS, 1, number))
    table += by_seed / np.sqrt(number) * draw((SETTINGS, seeds, 1))
    table += 3 * draw(number) + draw((seeds, number)) + draw((seeds, 1)) / np.sqrt(number)
    weights, ids = np.ones(number), tuple(map(str, range(number)))
    if shape == "skewed":
        table = np.exp(table / 2)
    if shape == "binary":
        table = (table > 0).astype(float)
    if shape == "lengths":  # means over tokens, of which records have 5 to 500, most of them few
        weights = np.clip(np.rint(np.exp(3 + draw(number))), 5, 500)
    return [[RecordScores(ids, row * weights, weights) for row in rows] for rows in table]


def promoted(found):
    return found.least_gain is not None and found.least_gain > 0


def rate(values):
    return float(np.mean(list(values)))


if __name__ == "__main__":
    main()
