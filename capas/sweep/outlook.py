"""Estimate what a sweep is about to do: how many trials, how many are done, how long the rest takes."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capas.config.hydra_overrides import Point
from capas.core import timings
from capas.core.dag import StageSpec
from capas.core.worktree import git
from capas.sweep.plan import FOLDER, Plan, digest
from capas.sweep.shared import keys_of
from capas.sweep.state import DONE, State

_SECONDS_OF_DVC = 6.0  # per trial, for laying out its workspace and for DVC


def cached(plan: Plan, points: Iterable[Point]) -> list[Point]:
    """Return the trials that are already experiments of this commit."""
    pattern = plan.reference("*")
    found = git(plan.home, "for-each-ref", "--format=%(refname)", pattern).split()
    identities = {reference.rpartition("-")[2] for reference in found}
    return [point for point in points if digest(point.values, plan.inputs) in identities]


def earlier(home: Path) -> list[State]:
    """Return the finished trials of all sweeps here; a sweep deletes its own records when started again."""
    files = (home / FOLDER / "plans").glob("*/points/*.json")
    return [state for state in map(State.read, files) if state.status == DONE]


def seconds_of_all(
    plan: Plan,
    points: Sequence[Point],
    before: Sequence[State],
    base: Mapping[str, Any],
    at_once: int,
) -> tuple[float, str] | None:
    """Return how long the trials take and the source of the estimate; None if nothing has run here yet.

    Args:
        points: the trials that are not done.
        before: finished trials, from `earlier`.
        base: the values of conf/ without overrides, whose stages are assumed to be in the cache.
        at_once: trials that run at the same time.
    """
    if not points:
        return 0.0, "nothing to run"
    rounds = math.ceil(len(points) / at_once) / len(points)
    if (mean := _of_like(points, before)) is not None:
        return mean * len(points) * rounds, "earlier trials"
    found = _of_stages(plan, points, base)
    return None if found is None else (found * rounds, "reports/timings")


def in_words(
    num_points: int, num_cached: int, found: tuple[float, str] | None, at_once: int
) -> str:
    """Return the plan as one line."""
    done = f", {num_cached} already done" if num_cached else ""
    left = num_points - num_cached
    beside = f", {min(at_once, left)} at once" if at_once > 1 < left else ""
    if not left:
        return f"{_points(num_points)}{done}: nothing to run"
    if found is None:
        return (
            f"{_points(num_points)}{done}; {left} to run{beside}; duration unknown: no earlier "
            "run on this machine"
        )
    seconds, source = found
    return f"{_points(num_points)}{done}; {left} to run{beside}, {_minutes(seconds)} ({source})"


def _points(number: int) -> str:
    return "1 trial" if number == 1 else f"{number} trials"


def _minutes(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return "less than a minute"
    if minutes < 90:
        return f"about {minutes:.0f} {'minute' if round(minutes) == 1 else 'minutes'}"
    return f"about {minutes / 60:.1f} hours"


def _of_like(points: Sequence[Point], before: Sequence[State]) -> float | None:
    """Return the median seconds of earlier trials with the same keys and the same fixed values."""
    keys = _keys(points[0].overrides)
    fixed = set(points[0].overrides).intersection(*(point.overrides for point in points))
    like = [s for s in before if _keys(s.overrides) == keys and fixed.issubset(s.overrides)]
    if len(points) == 1:  # one trial does not show which values vary: only the keys count
        like = [state for state in before if _keys(state.overrides) == keys]
    return statistics.median(state.seconds for state in like) if like else None


def _keys(overrides: Iterable[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def _of_stages(plan: Plan, points: Sequence[Point], base: Mapping[str, Any]) -> float | None:
    """Return the seconds of all stages that will run, equal inputs counted once; None if unknown."""
    known = timings.read(plan.home)
    specs = StageSpec.read_all(plan.home)
    there = {*keys_of(specs, dict(base), plan.inputs).values()}
    there |= {file.stem for file in (plan.base / "done").glob("*.json")}
    total = len(points) * (_SECONDS_OF_DVC + known.get("publish", {}).get("seconds", 0.0))
    for point in points:
        for stage, key in keys_of(specs, point.values, plan.inputs).items():
            if key in there:
                continue
            there.add(key)
            if stage not in known:
                return None
            share = _share_of_steps(plan.home, point.values, base) if stage == "train" else 1.0
            total += share * float(known[stage]["seconds"])
    return total


def _share_of_steps(home: Path, values: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """Return the steps of a training as a fraction of the steps of the last training here."""
    file = home / "reports/train.json"
    trainer, last = values["trainer"], base["trainer"]
    if trainer["max_steps"] > 0 and file.exists():
        return float(trainer["max_steps"] / json.loads(file.read_text())["num_steps"])
    if trainer["max_steps"] == last["max_steps"]:
        return float(trainer["num_train_epochs"] / last["num_train_epochs"])
    return 1.0
