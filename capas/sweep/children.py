"""Keep one run in MLflow for each trial of a sweep: a child of the sweep's run, and a row of its table.

The training run cannot be that row. A run has one parent, but several sweeps may contain the trial. Trials
that differ only in their evaluation even share one training. So a child holds what the sweep compares, and
names the training run, which has everything else: artifacts, model, lineage.

    tags sweep.trial KEY-IDENTITY, sweep.training RUN_ID   params lora.r=8   metrics train.validation_loss=0.3
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from capas.config.hydra_overrides import key_of
from capas.sweep.plan import Plan
from capas.sweep.rungs import Ladder
from capas.sweep.state import CACHED, DONE, DROPPED, FAILED, State
from capas.tracking.client import Point, Run
from capas.tracking.pages import LOSSES, Pages
from capas.tracking.run_params import clipped, metric_name
from capas.tracking.store import EXPERIMENT, Store, tracking_uri

TRIAL, TRAINING = "sweep.trial", "sweep.training"
RUNG = "rung/"  # begins the names of scores of trainings that went on, or were dropped
_PARENT, _NOTE = "mlflow.parentRunId", "mlflow.note.content"
_STATUS = {DONE: "FINISHED", CACHED: "FINISHED", FAILED: "FAILED", DROPPED: "FINISHED"}
_MAX_NOTE = 4000  # characters


class Stores(NamedTuple):
    """The two experiments in MLflow: that of the sweeps and that of the training runs."""

    sweeps: Store
    trainings: Store


class Children:
    """The runs of a sweep's trials.

    Args:
        parent: the id of the sweep's run.
    """

    def __init__(self, plan: Plan, stores: Stores, parent: str) -> None:
        self.plan, self.stores, self.parent = plan, stores, parent
        self._written: dict[str, tuple[str, str]] = {}  # by identity

    def write(self, state: State, training_id: str) -> None:
        """Create or complete the run of a trial that has ended; call it while holding the sweep's lock.

        Args:
            training_id: the id of the training run; "" if MLflow has none.
        """
        facts = state.status, training_id
        if self._written.get(state.identity) == facts:
            return
        # It is read anew, because publish has changed its name since it was found.
        training = self.stores.trainings.client.get_run(training_id) if training_id else None
        store, tags = self.stores.sweeps, self._tags(state, training)
        started = int(1000 * state.started)
        run = store.only(
            TRIAL, f"{self.plan.key}-{state.identity}", lambda: state.name, tags, started
        )
        store.send_tags(run, tags)
        store.send_params(run, params_of(state.overrides))
        store.send_metrics(run, _numbers(state))  # at a rung they are no result: see `rung_points`
        store.log_points(run.id, rung_points(Ladder.of(self.plan.folder, state.identity)))
        if training is not None:
            self._send_losses(run, training)
        store.set_status(run.id, _STATUS[state.status], started + int(1000 * state.seconds))
        self._written[state.identity] = facts

    def _tags(self, state: State, training: Run | None) -> dict[str, str]:
        note = state.reason if state.status != DROPPED else f"Dropped at {state.rung}."
        tags = {_PARENT: self.parent, EXPERIMENT: state.name, _NOTE: note[:_MAX_NOTE]}
        if training is not None:
            page = Pages(tracking_uri(self.plan.home), training.experiment_id).run_link(training.id)
            link = f"The training run, with artifacts and model: [{training.name}]({page})"
            tags |= {TRAINING: training.id, _NOTE: f"{link}\n\n{tags[_NOTE]}".strip()}
        return tags

    def _send_losses(self, run: Run, training: Run) -> None:
        """Copy the curves of the losses, so that the sweep's charts compare them."""
        for name in LOSSES:
            history = self.stores.trainings.client.get_metric_history(training.id, name)
            points = [Point(name, metric.step, metric.value) for metric in history]
            self.stores.sweeps.log_points(run.id, points)


def shown_metrics(states: Iterable[State]) -> list[str]:
    """Return the names in MLflow of what trials have, results before scores at a rung."""
    ended = sorted(states, key=lambda state: state.status == DROPPED)
    return list(
        dict.fromkeys(
            RUNG + name.partition(".")[2] if state.status == DROPPED else metric_name(name)
            for state in ended
            for name in state.metrics
        )
    )


def rung_points(ladder: Ladder) -> list[Point]:
    """Return the scores at the rungs of successive halving, as curves over the steps."""
    return [
        Point(f"{RUNG}{name}", rung.step, value)
        for rung in ladder.rungs.values()
        for name, value in rung.scores.items()
    ]


def params_of(overrides: Iterable[str]) -> dict[str, str]:
    """Return a trial's overrides under the names of MLflow's params.

    >>> params_of(["model=llama", "lora.r=8"])
    {'model.preset': 'llama', 'lora.r': '8'}
    """
    found = {}
    for override in overrides:
        key = key_of(override)
        name = key if "." in key or key == "seed" else f"{key}.preset"
        found[name] = override.partition("=")[2]
    return clipped(found)


def swept_values(states: Iterable[State]) -> dict[str, list[str]]:
    """Return the values of each param that has several in these trials, in order."""
    values: dict[str, set[str]] = {}
    for state in states:
        for name, value in params_of(state.overrides).items():
            values.setdefault(name, set()).add(value)
    return {name: _ordered(found) for name, found in sorted(values.items()) if len(found) > 1}


def _ordered(values: Iterable[str]) -> list[str]:
    """Return values in the order of their numbers if all are numbers, else of their texts."""
    texts = sorted(values)
    try:
        return sorted(texts, key=float)
    except ValueError:
        return texts


def _numbers(state: State) -> dict[str, float]:
    """Return the metrics of a trial that has ended, as far as they have a finite value."""
    if state.status == DROPPED:
        return {}
    return {
        metric_name(name): value
        for name, value in state.metrics.items()
        if value is not None and math.isfinite(value)
    }
