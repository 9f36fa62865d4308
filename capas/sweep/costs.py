"""Determine what each trial cost: seconds of training if it ran here, else what its training recorded.

    .dvc/tmp/sweep/seconds/TRAIN_KEY.json   {"seconds": 41.2}

A trial that is found again takes no time, so the seconds are kept beside the sweeps.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capas.core import timings
from capas.core.dag import recorded, recorded_key
from capas.core.files import read_json, write_whole
from capas.sweep.plan import Plan
from capas.sweep.ranking import Row

TRAINING = "reports/train.json"
SECONDS = "train_seconds"
# What makes a training cost more, the best measure first.
MEASURES = (SECONDS, "num_train_tokens", "num_steps", "num_trainable_parameters")


def remember(plan: Plan, work: Path) -> None:
    """Keep the seconds of the training that ran in a trial's workspace, if one did."""
    lock = recorded(work)
    ran = timings.matching(timings.read(work), lock).get("train")
    if ran is not None:
        write_whole(
            _file(plan, recorded_key(lock["train"])), json.dumps({"seconds": ran["seconds"]})
        )


def recall(plan: Plan, train_key: str) -> float | None:
    """Return the seconds of a training, or None if it did not run here."""
    file = _file(plan, train_key)
    return float(json.loads(file.read_text(encoding="utf-8"))["seconds"]) if file.exists() else None


def _file(plan: Plan, train_key: str) -> Path:
    return plan.base / "seconds" / f"{train_key}.json"


@dataclass(frozen=True)
class Costs:
    """What the settings of a sweep cost.

    Attributes:
        measure: one of MEASURES; the first that is known of all and is not the same for all.
        of_rows: the mean over each row's trials.
    """

    measure: str
    of_rows: tuple[float, ...]


def of_trials(rows: Iterable[Row], plan: Plan) -> dict[str, dict[str, float]]:
    """Return what is known of each trial's training, by the name of its experiment."""
    found = {}
    for state in (state for row in rows for state in row.states):
        known = {SECONDS: state.train_seconds, **_recorded(state.name, plan)}
        found[state.name] = {key: float(known[key]) for key in MEASURES if known.get(key)}
    return found


def _recorded(experiment: str, plan: Plan) -> dict[str, Any]:
    """Return reports/train.json of an experiment, or nothing if DVC's cache no longer has it."""
    file = plan.outputs(experiment).find(TRAINING)
    return {} if file is None else read_json(file)


def compare(rows: Sequence[Row], known: dict[str, dict[str, float]]) -> Costs | None:
    """Return the costs in the best measure that separates the rows; None if there is none."""
    for measure in MEASURES:
        trials = [[known.get(state.name, {}).get(measure) for state in row.states] for row in rows]
        numbers = [[cost for cost in row if cost is not None] for row in trials]
        if numbers == trials and len({tuple(row) for row in numbers}) > 1:
            return Costs(measure, tuple(statistics.fmean(row) for row in numbers))
    return None


def pareto(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the places, cheapest first, that none beats in both: costs less is better, scores more.

    >>> pareto([1, 2, 3], [0.5, 0.4, 0.9])
    [0, 2]
    """
    best: list[int] = []
    for place in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        last = best[-1] if best else None
        equal = last is not None and (costs[place], scores[place]) == (costs[last], scores[last])
        if last is None or equal or scores[place] > scores[last]:
            best.append(place)
    return best
