"""A sweep in MLflow: a row for each of its trials, whatever other sweeps, kills and repetitions do."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeping import wait

from capas.core.locks import exclusive
from capas.sweep import driver, parent
from capas.sweep.children import TRAINING, TRIAL, params_of, shown_metrics, swept_values
from capas.sweep.page import Result
from capas.sweep.parent import KEY, finish, follow
from capas.sweep.plan import Plan
from capas.sweep.ranking import rank
from capas.sweep.rungs import Ladder, Rung
from capas.sweep.state import CACHED, DONE, DROPPED, FAILED, RUNNING, WAITING, State, read_states
from capas.tracking.client import Point, Run
from capas.tracking.pages import VIEW_TAG
from capas.tracking.store import TRAIN_KEY, Store, sweeps_of

PARENT = "mlflow.parentRunId"
LOSS, SCORE = "train.validation_loss", "tuned.exact_match"
SETTINGS = {
    **{"objective": LOSS, "direction": "minimize", "columns": [SCORE]},
    **{"replicates": ["seed"], "confidence_fraction": 0.95, "language": "en"},
}
BY_SCORE = {**SETTINGS, "objective": SCORE, "direction": "maximize", "columns": []}


class Home:
    """A repository with trainings that MLflow has already, and plans of sweeps."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trainings = Store.open(root, "capas")

    @property
    def sweeps(self) -> Store:
        return Store.open(self.root, sweeps_of("capas"))

    def plan(self, key: str, *words: str) -> Plan:
        plan = Plan(self.root, key, words, "c" * 40, "t" * 40, "inputs", (), self.root / "cache")
        for folder in (plan.points, plan.folder / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        settings = {"enabled": True, "experiment_name": "capas"}
        (plan.folder / parent.SETTINGS).write_text(json.dumps(settings))
        return plan

    def train(self, key: str) -> Run:
        run = self.trainings.find_or_create(key, lambda: f"training {key}")
        self.trainings.log_points(run.id, [Point("train/loss", step, 1 / step) for step in (1, 2)])
        self.trainings.set_status(run.id, "FINISHED")
        return run

    def runs(self, store: Store | None = None) -> list[Run]:
        store = store or self.sweeps
        return store.client.search_runs([store.experiment_id])

    def parent(self, plan: Plan) -> Run:
        (found,) = [run for run in self.runs() if run.tags.get(KEY) == plan.key]
        return found

    def children(self, plan: Plan) -> list[Run]:
        found = [run for run in self.runs() if run.tags.get(PARENT) == self.parent(plan).id]
        return sorted(found, key=lambda run: run.name)


@pytest.fixture
def home(tmp_path: Path, empty_mlflow_db: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "CAPAS_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parent, "_SECONDS_BETWEEN_LOOKS", 0.05)
    shutil.copyfile(empty_mlflow_db, tmp_path / "mlflow.db")
    return Home(tmp_path)


def trial(identity: str, *overrides: str, train_key: str = "", **facts: Any) -> State:
    """An ended trial; its metrics are the objective's and another."""
    metrics = {LOSS: facts.pop("loss", 0.5), SCORE: facts.pop("score", 0.9)}
    status = facts.pop("status", DONE)
    name = f"{'-'.join(overrides)}-{identity}"
    return State(
        *(identity, name, list(overrides)), status=status, train_key=train_key or identity,
        metrics=metrics, **facts,
    )  # fmt: skip


def say(plan: Plan, *states: State) -> None:
    """What the workers of a start of the sweep have written."""
    for file in plan.points.iterdir():
        file.unlink()
    for state in states:
        state.write(plan.points)


@contextmanager
def followed(plan: Plan) -> Iterator[None]:
    """The process beside a sweep that goes on for as long as the block."""
    (plan.folder / parent.RESULT).unlink(missing_ok=True)
    stdin, sweep = os.pipe()
    thread = threading.Thread(target=follow, args=(plan, stdin))
    thread.start()
    try:
        with exclusive(plan.lock(f"sweep-{plan.key}"), seconds=0):
            yield
    finally:
        os.close(sweep)
        thread.join(60)
        os.close(stdin)


def swept(plan: Plan, *states: State, settings: dict[str, Any] = SETTINGS) -> None:
    """A sweep from its start to its end."""
    with followed(plan):
        say(plan, *states)
        failed = any(state.status == FAILED for state in states)
        ranking = rank(read_states(plan.points), settings)
        finish(plan, driver.summary(ranking, settings, failed, {}))


def test_the_page_is_an_artifact_of_the_sweep_s_run(home: Home) -> None:
    plan, states = home.plan("one", "lora.r=8,16"), two_trials(home)
    found = Result(rank(states, SETTINGS), SETTINGS)
    with followed(plan):
        say(plan, *states)
        finish(plan, driver._for_mlflow(found, "", plan, is_tracked=True))
    run = home.parent(plan)
    assert run.status == "FINISHED"
    assert run.tags["mlflow.note.content"].startswith("The page: artifact `sweep/sweep.html`.")
    html = home.sweeps.client.read_artifact(run.id, "sweep/sweep.html", "the sweep")
    assert html == (plan.folder / "sweep.html").read_bytes()
    assert b'lang="es"' in home.sweeps.client.read_artifact(run.id, "sweep/sweep.es.html", "it")


def test_a_dropped_trial_has_its_score_at_a_rung_and_no_result(home: Home) -> None:
    plan, (first, second) = home.plan("one", "lora.r=8,16"), two_trials(home)
    dropped = replace(second, status=DROPPED, metrics={LOSS: 0.9}, step=3, num_steps=27)
    ladder = Ladder.of(plan.folder, second.identity)
    ladder.rungs["1/9"] = Rung(3, 27, {"validation_loss": 0.9})
    ladder.write()
    swept(plan, first, dropped)
    ended, other = home.children(plan)
    assert ended.name == second.name and ended.status == other.status == "FINISHED"
    assert ended.metrics["rung/validation_loss"] == 0.9 and LOSS not in ended.metrics
    assert other.metrics[LOSS] == 0.5
    assert "Dropped at step 3 of 27." in ended.tags["mlflow.note.content"]
    assert shown_metrics([dropped, first]) == [LOSS, SCORE, "rung/validation_loss"]


def cached(*states: State) -> list[State]:
    return [replace(state, status=CACHED) for state in states]


def two_trials(home: Home) -> tuple[State, State]:
    for key in ("a", "b"):
        home.train(key)
    return trial("a", "lora.r=8", loss=0.5), trial("b", "lora.r=16", loss=0.4)


def times(home: Home) -> dict[str, tuple[str, int | None]]:
    return {run.id: (run.status, run.end_time) for run in home.runs()}


def test_a_finished_sweep_stays_finished_while_it_is_run_again(home: Home) -> None:
    plan, states = home.plan("one", "lora.r=8,16"), two_trials(home)
    swept(plan, *states)
    before = times(home)
    with followed(plan):
        say(plan, *(replace(state, status=WAITING) for state in states))
        threading.Event().wait(0.5)  # several looks
        assert times(home) == before
        say(plan, *cached(*states))
        threading.Event().wait(0.5)
    assert times(home) == before  # and it was killed: it has no result
    (plan.folder / parent.TRACKED).unlink()  # of an earlier version, say
    swept(plan, *cached(*states))
    assert times(home) == before


def test_a_sweep_that_trains_is_running_and_killed_where_it_is_killed(home: Home) -> None:
    plan, (first, second) = home.plan("one", "lora.r=8,16"), two_trials(home)
    with followed(plan):
        say(plan, first, replace(second, status=RUNNING))
        wait(lambda: bool(home.runs()) and bool(home.children(plan)), 20)
        assert home.parent(plan).status == "RUNNING"
        assert [run.name for run in home.children(plan)] == [first.name]
    assert home.parent(plan).status == "KILLED"
    swept(plan, *cached(first), second)
    assert home.parent(plan).status == "FINISHED"
    assert len(home.children(plan)) == 2 and len(home.runs()) == 3


def test_each_sweep_keeps_its_rows(home: Home) -> None:
    states = two_trials(home)
    one, other = home.plan("one", "lora.r=8,16"), home.plan("other", "lora.r=16,8")
    swept(one, *states)
    swept(other, *cached(*states), settings=BY_SCORE)
    for plan in (one, other):
        assert [run.params for run in home.children(plan)] == [{"lora.r": "16"}, {"lora.r": "8"}]
    trainings = home.runs(home.trainings)
    assert len(trainings) == 2
    for run in trainings:
        assert PARENT not in run.tags
        assert {
            "sweep.one": "lora.r=8,16",
            "sweep.other": "lora.r=16,8",
        }.items() <= run.tags.items()


def test_trials_that_differ_in_their_evaluation_alone_are_two_rows(home: Home) -> None:
    training = home.train("shared")
    plan = home.plan("one", "generation.max_new_tokens=8,64")
    swept(
        plan,
        trial("a", "generation.max_new_tokens=8", train_key="shared", score=0.2),
        trial("b", "generation.max_new_tokens=64", train_key="shared", score=0.7),
    )
    long, short = home.children(plan)
    assert (long.params, long.metrics[SCORE]) == ({"generation.max_new_tokens": "64"}, 0.7)
    assert (short.params, short.metrics[SCORE]) == ({"generation.max_new_tokens": "8"}, 0.2)
    assert {run.tags[TRAINING] for run in (long, short)} == {training.id}


def test_a_row_names_its_training_as_it_is_called_in_the_end(home: Home) -> None:
    plan, (state, _) = home.plan("one", "lora.r=8"), two_trials(home)
    training = home.trainings.find("a")
    assert training is not None
    with followed(plan):
        say(plan, replace(state, status=RUNNING))
        wait(lambda: "sweep.one" in home.trainings.client.get_run(training.id).tags, 20)
        home.trainings.client.set_tag(training.id, "mlflow.runName", "published")
        say(plan, state)
    (row,) = home.children(plan)
    assert "[published](" in row.tags["mlflow.note.content"]


def test_a_row_has_its_training_and_curve_once(home: Home) -> None:
    plan, states = home.plan("one", "lora.r=8,16"), two_trials(home)
    for _ in range(2):
        swept(plan, *states)
        (plan.folder / parent.TRACKED).unlink()
    training, row = home.trainings.find("a"), home.children(plan)[1]
    assert training is not None
    assert row.tags["dvc.experiment"] == "lora.r=8-a"
    page = f"#/experiments/{training.experiment_id}/runs/{training.id}?workflowType="
    assert f"[{training.name}]({page}" in row.tags["mlflow.note.content"]
    history = home.sweeps.client.get_metric_history(row.id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    assert len(home.sweeps.client.get_metric_history(row.id, LOSS)) == 1
    assert TRAIN_KEY not in row.tags  # only the training run is one


def test_a_failed_trial_is_a_failed_row_until_it_succeeds(home: Home) -> None:
    plan, (first, second) = home.plan("one", "lora.r=8,16"), two_trials(home)
    failed = trial("b", "lora.r=16", train_key="none", status=FAILED, reason="the loss is nan")
    failed.metrics = {}
    swept(plan, first, failed)
    row = home.children(plan)[0]
    assert (row.status, row.tags["mlflow.note.content"]) == ("FAILED", "the loss is nan")
    assert home.parent(plan).status == "FAILED"
    swept(plan, *cached(first), second)
    again = home.children(plan)[0]
    assert (again.id, again.status, again.metrics[LOSS]) == (row.id, "FINISHED", 0.4)
    assert "nan" not in again.tags["mlflow.note.content"]


def test_the_sweep_says_what_was_swept_and_what_was_best(home: Home) -> None:
    plan, states = home.plan("one", "lora.r=8,16", "seed=1"), two_trials(home)
    swept(plan, *states)
    found = home.parent(plan)
    assert found.params == {"lora.r": "8, 16"}
    assert found.metrics == {f"best/{LOSS}": 0.4, "num_trials": 2.0}
    assert found.tags["best.lora.r"] == "16"
    assert (found.tags["sweep.objective"], found.tags["sweep.direction"]) == (LOSS, "minimize")


def test_the_view_of_a_sweep_shows_its_rows_best_first(home: Home) -> None:
    plan, states = home.plan("one", "lora.r=8,16"), two_trials(home)
    swept(plan, *states)
    store = home.sweeps
    tags = store.client.get_experiment(store.experiment_id).tags
    view = json.loads(tags[f"{VIEW_TAG}sweep-one"])
    assert (view["orderByKey"], view["orderByAsc"]) == (f"metrics.`{LOSS}`", True)
    assert view["selectedColumns"][:3] == [
        *(f"metrics.`{name}`" for name in (LOSS, SCORE)),
        "params.`lora.r`",
    ]
    shown = store.client.search_runs([store.experiment_id], view["searchFilter"])
    assert {run.id for run in shown} == {run.id for run in home.children(plan)}
    assert parent.address(plan) is not None


def test_what_a_killed_process_left_running_is_ended_by_the_next_sweep(home: Home) -> None:
    plan, states = home.plan("two", "lora.r=8,16"), two_trials(home)
    lost = home.plan("one").lock("sweep-one")
    with exclusive(lost, seconds=0):
        pass  # it was held here
    old = home.trainings.only(KEY, "one", lambda: "a sweep of an earlier version")
    left = [
        home.sweeps.only(KEY, "one", lambda: "sweep"),
        home.sweeps.only(TRIAL, "one-a", lambda: "trial"),
    ]
    swept(plan, *states)
    assert {home.sweeps.client.get_run(run.id).status for run in (old, *left)} == {"FAILED"}


def test_a_training_with_an_older_parent_is_left_in_it(home: Home) -> None:
    plan, states = home.plan("one", "lora.r=8,16"), two_trials(home)
    old, training = home.trainings.only(KEY, "old", lambda: "sweep"), home.trainings.find("a")
    assert training is not None
    home.trainings.send_tags(training, {PARENT: old.id, "sweep.old": "lora.r=8,16"})
    swept(plan, *states)
    assert home.trainings.client.get_run(training.id).tags[PARENT] == old.id
    assert len(home.children(plan)) == 2


def test_swept_values_are_named_as_params_and_in_order() -> None:
    words = (("+lora.r=16", "model=b", "seed=1"), ("+lora.r=8", "model=a", "seed=1"))
    states = [trial(str(i), *overrides) for i, overrides in enumerate(words)]
    assert swept_values(states) == {"lora.r": ["8", "16"], "model.preset": ["a", "b"]}
    assert params_of(words[0]) == {"lora.r": "16", "model.preset": "b", "seed": "1"}
