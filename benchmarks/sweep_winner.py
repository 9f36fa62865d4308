"""Simulate how often a sweep's ranking is wrong: `python benchmarks/sweep_winner.py`, some two minutes.

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

import machine
import numpy as np

from capas.sweep.comparison import compare
from capas.sweep.records import RecordScores

SIMULATIONS, OF_RECORDS = 5_000, 1_000
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
        "one seed": {f"{number} records": rates_of_one_seed(number) for number in RECORDS},
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
        table = record_scores(rng, seeds, number, **kind)
        null.append(compare(table.mean(axis=2), 0, records=table))
        alone.append(compare(table.mean(axis=2), 0))
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
    table = record_scores(rng, seeds, number, **kind)
    table[1] += gain
    return compare(table.mean(axis=2), 0, records=table)


def rates_of_one_seed(number: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    alike = rates_of_models(rng, number)
    misled, too_large = [], []
    for _ in range(OF_RECORDS):
        by_seed = rng.standard_normal(SETTINGS) / np.sqrt(number)
        table = record_scores(rng, 1, number, by_seed=0.0) + by_seed[:, None, None]
        one = compare(table.mean(axis=2), 0, records=table)
        misled.append(promoted(one))
        true = by_seed[one.best] - by_seed[0]
        too_large.append(one.least_gain is not None and one.least_gain > true)
    return {
        **alike,
        "gain too large": rate(too_large),
        "promoted, seeds favour settings": rate(misled),
    }


def rates_of_models(rng, number: int) -> dict[str, float]:
    tables = (record_scores(rng, 1, number, by_seed=0.0) for _ in range(OF_RECORDS))
    null = [compare(table.mean(axis=2), 0, records=table) for table in tables]
    gain = float(np.median([one.detectable for one in null]))
    true = [with_gain(rng, gain, 1, number, by_seed=0.0) for _ in range(OF_RECORDS)]
    return {
        "promoted without effect": rate(promoted(one) for one in null),
        "called worse without effect": rate(not all(one.may_be_best) for one in null),
        "a true gain promoted": rate(promoted(one) and one.best == 1 for one in true),
    }


def record_scores(rng, seeds, number, by_seed=1.0, by_record=1.0, noise=1.0, shape="normal"):
    """Scores [settings, seeds, records] of settings without effect."""
    draw = rng.standard_normal
    table = noise * draw((SETTINGS, seeds, number)) + by_record * draw((SETTINGS, 1, number))
    table += by_seed / np.sqrt(number) * draw((SETTINGS, seeds, 1))
    table += 3 * draw(number) + draw((seeds, number)) + draw((seeds, 1)) / np.sqrt(number)
    if shape == "skewed":
        return np.exp(table / 2)
    if shape == "binary":
        return (table > 0).astype(float)
    return of_lengths(rng, table) if shape == "lengths" else table


def of_lengths(rng, table):
    """The same as means over tokens, of which records have 5 to 500, most of them few."""
    lengths = np.clip(np.rint(np.exp(3 + rng.standard_normal(table.shape[2]))), 5, 500)
    ids = tuple(map(str, range(len(lengths))))
    return np.array(
        [[RecordScores(ids, row * lengths, lengths).values() for row in trial] for trial in table]
    )


def promoted(found):
    return found.least_gain is not None and found.least_gain > 0


def rate(values):
    return float(np.mean(list(values)))


if __name__ == "__main__":
    main()
