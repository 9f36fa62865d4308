"""How often chance passes the gate: simulated evaluations of models that should not pass.

    python benchmarks/gate.py [DRAWS]      about five minutes with 2000; prints a table and writes the result

Each row is a null hypothesis, each column a size of the test split: the percentage of drawn test splits
that pass the check, or all of them. Scores are drawn; intervals and verdicts are the product's own
(`difference`, `length_ratio`, `batching_noise`, `judge`) with the limits of conf/evaluation. At most 5 is
wanted.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import yaml

from capas.core.params import Params
from capas.evaluation.difference import difference, length_ratio
from capas.evaluation.gate import judge
from capas.evaluation.noise import batching_noise

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/gate.json"
SIZES = (20, 50, 100, 500)
SHIPPED = yaml.safe_load((ROOT / "conf/evaluation/_base.yaml").read_text(encoding="utf-8"))
LIMITS = SHIPPED["gate"]
PARAMS = Params({"evaluation": {**SHIPPED, "bootstrap_resamples": 1000}})
BASE = {"loss": 0.0, "full_precision": None}

Rng = np.random.Generator
Facts = dict[str, Any]


def main(draws: int) -> None:
    table = {
        f"{check}: {name}": {str(n): passes(draw, check, n, draws) for n in SIZES}
        for check, nulls in NULLS.items()
        for name, draw in nulls.items()
    }
    width = max(map(len, table))
    print(" " * width, *(f"{n:>6}" for n in SIZES))
    for row, rates in table.items():
        print(f"{row:{width}}", *(f"{rate:6.1f}" for rate in rates.values()))
    found = {"percent_passed": table, "draws": draws, **machine.describe("numpy")}
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def passes(draw: Callable[[Rng, int], Facts], check: str, size: int, draws: int) -> float:
    """Return the percentage of drawn evaluations that pass a check, or `all` checks."""
    passed = 0
    for seed in range(draws):
        gate = judge(BASE, draw(np.random.default_rng([seed, size]), size), LIMITS)
        found = {c["name"].replace("score_", ""): c["passed"] for c in gate["checks"]}
        passed += gate["passed"] if check == "all" else bool(found[check])
    return round(100 * passed / draws, 1)


def evaluation(**found: Any) -> Facts:
    """An evaluation that passes every check but those in `found`."""
    rates = {"stop_rate": 1.0, "empty_rate": 0.0, "control_token_rate": 0.0}
    gain = {"mean": 1.0, "low": 1.0, "high": 1.0}
    return {
        "tuned": rates | found.pop("rates", {}),
        "difference": {"score": found.pop("gain", gain)},
        "difference_to_nearest": {"score": found.pop("over_nearest", gain)},
        "general": {"difference": found.pop("general", {"high": 0.0})},
        "metrics": ["score"],
        **found,
    }


def rows(scores: np.ndarray, tokens: np.ndarray | None = None) -> list[Facts]:
    counts = np.ones(len(scores)) if tokens is None else tokens
    pairs = zip(scores.tolist(), counts.tolist(), strict=True)
    return [{"score": s, "loss": s, "num_supervised_tokens": n} for s, n in pairs]


def compared(changes: np.ndarray, column: str = "score", tokens: Any = None) -> Facts:
    zero = rows(np.zeros(len(changes)), tokens)
    return difference(zero, rows(changes, tokens), column, PARAMS)


def right_or_wrong(share: float) -> Callable[[Rng, int], np.ndarray]:
    """Changes of right to wrong and of wrong to right, half of `share` each."""
    return lambda rng, n: rng.choice([1.0, -1.0, 0.0], n, p=[share / 2, share / 2, 1 - share])


def graded(rng: Rng, n: int) -> np.ndarray:
    """Changes of a graded score: most answers stay, the others change by about 0.15."""
    return rng.normal(0, 0.15, n) * (rng.random(n) < 0.4)


def skewed(rng: Rng, n: int) -> np.ndarray:
    """Small gains and fewer, larger losses; mean 0."""
    return 0.1 * (1 - rng.exponential(1, n))


def gain(changes: Callable[[Rng, int], np.ndarray]) -> Callable[[Rng, int], Facts]:
    return lambda rng, n: evaluation(gain=compared(changes(rng, n)))


def over_nearest(changes: Callable[[Rng, int], np.ndarray]) -> Callable[[Rng, int], Facts]:
    return lambda rng, n: evaluation(over_nearest=compared(changes(rng, n)))


def forgetting(noise: Callable[[Rng, int], np.ndarray]) -> Callable[[Rng, int], Facts]:
    """The loss on general questions rises by exactly the limit; answers have about 30 tokens."""

    def draw(rng: Rng, n: int) -> Facts:
        tokens = np.ceil(rng.lognormal(3.2, 0.5, n))
        changes = LIMITS["max_forgetting"] + noise(rng, n)
        return evaluation(general=compared(changes, "loss", tokens))

    return draw


def length(ratio: float, spread: float) -> Callable[[Rng, int], Facts]:
    """Answers `ratio` times as long as their references, whatever the record, but for `spread` in the log."""

    def draw(rng: Rng, n: int) -> Facts:
        references = np.ceil(rng.lognormal(4, 0.5, n))
        factors = rng.lognormal(-(spread**2) / 2, spread, n) * ratio
        pairs = zip(references, np.rint(references * factors), strict=True)
        texts = [{"reference": "x" * int(r), "completion": "x" * int(a)} for r, a in pairs]
        return evaluation(length_ratio=length_ratio(texts, PARAMS))

    return draw


def noise(share: float, one_way: bool = False) -> Callable[[Rng, int], Facts]:
    """The tuned model equals its base; batching flips `share` of the scores.

    Args:
        one_way: it spoils right answers of the base alone, so that the tuned model seems better.
    """

    def draw(rng: Rng, n: int) -> Facts:
        right = rng.random(n) < 0.5

        def decoded(affected: bool) -> np.ndarray:
            flips = (rng.random(n) < share) & (right if one_way else True)
            return np.where(flips & affected, ~right, right).astype(float)

        batched = {"base": decoded(True), "tuned": decoded(not one_way)}
        alone = {which: decoded(not one_way) for which in batched}
        few = min(n, SHIPPED["noise_records"])
        samples = [
            {w: [{"score": s, "completion": s} for s in scores[:few]] for w, scores in d.items()}
            for d in (batched, alone)
        ]
        found = batching_noise(*samples, "score", n, PARAMS)
        return evaluation(gain=compared(batched["tuned"] - batched["base"]), noise=found)

    return draw


def everything(rng: Rng, n: int) -> Facts:
    """No gain over base or copies, forgetting and length at their limits."""
    found = gain(right_or_wrong(0.2))(rng, n)
    found["difference_to_nearest"] = over_nearest(right_or_wrong(0.2))(rng, n)[
        "difference_to_nearest"
    ]
    found["general"] = forgetting(lambda r, m: r.normal(0, 0.45, m))(rng, 40)["general"]
    return found | {"length_ratio": length(LIMITS["max_length_ratio"], 0.5)(rng, n)["length_ratio"]}


def rate(name: str, true: float) -> Callable[[Rng, int], Facts]:
    return lambda rng, n: evaluation(rates={name: float((rng.random(n) < true).mean())})


NULLS: dict[str, dict[str, Callable[[Rng, int], Facts]]] = {
    "gain": {
        "right or wrong, 5 % change": gain(right_or_wrong(0.05)),
        "right or wrong, 20 % change": gain(right_or_wrong(0.2)),
        "right or wrong, 50 % change": gain(right_or_wrong(0.5)),
        "graded": gain(graded),
        "graded, skewed": gain(skewed),
    },
    "gain_over_nearest": {"right or wrong, 50 % change": over_nearest(right_or_wrong(0.5))},
    "forgetting": {
        "at the limit": forgetting(lambda rng, n: rng.normal(0, 0.45, n)),
        "at the limit, skewed": forgetting(lambda rng, n: 0.45 * (rng.exponential(1, n) - 1)),
    },
    "length_ratio_high": {
        "at the limit": length(LIMITS["max_length_ratio"], 0.3),
        "at the limit, skewed": length(LIMITS["max_length_ratio"], 0.7),
    },
    "length_ratio_low": {"at the limit": length(LIMITS["min_length_ratio"], 0.3)},
    "noise_floor": {
        "2 % of the scores flip": noise(0.02),
        "10 % of the scores flip": noise(0.1),
        "30 % of the scores flip": noise(0.3),
        "padding spoils all right answers of the base": noise(1.0, one_way=True),
    },
    # Compared as they are, without an interval: about half pass at the limit, few far from it.
    "stop_rate": {"true rate 0.89": rate("stop_rate", 0.89), "0.7": rate("stop_rate", 0.7)},
    "empty_rate": {"true rate 0.02": rate("empty_rate", 0.02), "0.1": rate("empty_rate", 0.1)},
    "all": {
        "no gain, all else right": gain(right_or_wrong(0.2)),
        "2 % of the scores flip, all else right": noise(0.02),
        "10 % of the scores flip, all else right": noise(0.1),
        "no gain, and each interval at its limit": everything,
    },
}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
