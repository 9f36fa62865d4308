"""Measure how far the batching of prompts alone moves the gain of the headline metric. Pure.

Padding and kernels round differently in a batch and alone, so that a greedy answer may take another token
where two are nearly as probable. Decoding is greedy, so there is no seed that could change an answer.
"""

import math
import random
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from capas.core.params import Params
from capas.evaluation.difference import difference
from capas.evaluation.predictions import Row

Models = Mapping[str, list[Row]]  # {"base": rows, "tuned": rows}, of the same records


def choose(num_records: int, count: int) -> list[int]:
    """Return the positions of the records that are decoded again, at most `count`, in rising order.

    They depend on no seed of the user's, so that the base's answers are decoded once for all evaluations.
    The fewer are some of the more.
    """
    order = list(range(num_records))
    random.Random(0).shuffle(order)
    return sorted(order[:count])


def batching_noise(
    batched: Models, alone: Models, name: str, num_records: int, params: Params
) -> dict[str, Any]:
    """Return the noise of the gain: the larger one of two effects of batching.

    `chance`, of answers that change independently: z x sqrt(mean(d^2) / num_records), where d is the change
    of a record's gain. Two evaluations of the same models, batched differently, differ by less with
    probability `confidence_fraction` (repeatability limit). `shift`, of answers that change in one direction,
    as by wrong padding: the mean of d. It counts if its interval excludes zero, with the farther end.

    Args:
        batched, alone: the rows of the sample, answered in batches and one by one.
        name: the headline metric.
        num_records: records of the test split.

    Source: ISO 5725-6:1994, "Accuracy of measurement methods and results", for the repeatability limit.
    """
    before, after = _gains(batched, name), _gains(alone, name)
    changes = [new["gain"] - old["gain"] for old, new in zip(before, after, strict=True)]
    shift = difference(before, after, "gain", params)
    z = NormalDist().inv_cdf((1 + params.evaluation.confidence_fraction) / 2)
    chance = z * math.sqrt(sum(d * d for d in changes) / len(changes) / num_records)
    is_proven = shift["low"] > 0 or shift["high"] < 0
    farther = max(abs(shift["low"]), abs(shift["high"])) if is_proven else 0.0
    return {
        "num_records": len(changes),
        "num_changed_answers": {which: _changed(batched[which], alone[which]) for which in batched},
        "shift": {end: shift[end] for end in ("mean", "low", "high")},
        "chance": chance,
        "noise": max(chance, farther),
    }


def _gains(models: Models, name: str) -> list[Row]:
    pairs = zip(models["base"], models["tuned"], strict=True)
    return [{"gain": float(tuned[name]) - float(base[name])} for base, tuned in pairs]


def _changed(batched: list[Row], alone: list[Row]) -> int:
    pairs = zip(batched, alone, strict=True)
    return sum(before["completion"] != after["completion"] for before, after in pairs)
