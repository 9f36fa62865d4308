"""Simulate how often a sweep's ranking is wrong: `python benchmarks/sweep_winner.py`, half a minute.

Settings without any effect: how often one is promoted over the default, one is called worse, one is called
the best. With one setting that is better by what the sweep says it could have shown: how often that one is
promoted. The scores are drawn with what a seed does to all settings. In the last column a tenth of the
settings scatters eight times as much as the others, and is worse.
"""

import json

import machine
import numpy as np

from capas.sweep.comparison import compare

SIMULATIONS = 5_000
SHAPES = ((2, 3), (6, 3), (21, 2), (21, 3), (21, 5), (40, 3))  # settings with the default, seeds


def main() -> None:
    rows = {
        f"{settings} settings, {seeds} seeds": rates(settings, seeds) for settings, seeds in SHAPES
    }
    facts = {"simulations": SIMULATIONS, "confidence": 0.95, "rates": rows}
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


def promoted(found):
    return found.least_gain is not None and found.least_gain > 0


def rate(values):
    return float(np.mean(list(values)))


if __name__ == "__main__":
    main()
