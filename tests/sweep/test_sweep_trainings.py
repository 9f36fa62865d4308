"""A sweep of real trainings: killed in one it goes on from the checkpoint, to the same bytes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sweeping import Sweeper, kill, wait
from workspace import make_workspace

from capas.sweep.children import TRAINING, TRIAL
from capas.sweep.parent import KEY
from capas.tracking.store import TRAIN_KEY, Store, sweeps_of

pytestmark = pytest.mark.slow
WORDS = ("-m", "experiment=quick", "trainer.max_steps=40", "trainer.learning_rate=0.001,0.004")
LAST_STEP = 40
PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="module")
def sweeper(tmp_path_factory: pytest.TempPathFactory) -> Sweeper:
    """After a sweep that was killed in its first training, and the same once more."""
    made = Sweeper(make_workspace(tmp_path_factory.mktemp("sweep")).root)
    process = made.sweep_beside(*WORDS)
    wait_for_checkpoint(made.root)
    kill(process)
    made.wait_until_idle()
    assert made.experiments() == {}
    wait_for_status(made, training="FAILED", parent="KILLED")
    said = made.sweep(*WORDS)
    assert "1/2" in said and "2/2" in said
    return made


def wait_for_checkpoint(root: Path, seconds: float = 300) -> None:
    pattern = "work/*/.dvc/tmp/checkpoints/train-*/checkpoint-10/complete.json"
    wait(lambda: any((root / ".dvc/tmp/sweep").glob(pattern)), seconds)


def wait_for_status(sweeper: Sweeper, training: str, parent: str, seconds: float = 60) -> None:
    """What outlives a sweep to say in MLflow that it is no more has said so."""

    def found() -> set[str]:
        return {run.status for run in tracked(sweeper)}

    wait(lambda: found() == {training, parent}, seconds, found)


def tracked(sweeper: Sweeper) -> list[Any]:
    stores = [Store.open(sweeper.root, name) for name in ("capas", sweeps_of("capas"))]
    return list(stores[0].client.search_runs([store.experiment_id for store in stores]))


def names(sweeper: Sweeper, rate: str) -> str:
    (name,) = [name for name in sweeper.experiments() if f"learning_rate={rate}-" in name]
    return name


def test_the_training_goes_on_from_its_checkpoint(sweeper: Sweeper) -> None:
    logs = {path.name: path.read_text() for path in sweeper.root.glob(".dvc/tmp/sweep/**/*.log")}
    resumed = [name for name, text in logs.items() if "resuming from checkpoint-" in text]
    assert [name.startswith(names(sweeper, "0.001")) for name in resumed] == [True], logs


def test_it_ends_in_the_bytes_of_one_that_nobody_disturbed(sweeper: Sweeper) -> None:
    name = names(sweeper, "0.001")
    sweeper.run("dvc", "exp", "apply", name)
    swept = sweeper.lock(name)["train"]
    sweeper.run("rm", "-rf", "data/models/adapter", ".dvc/cache/runs")
    said = sweeper.repro("--force", "--single-item", "train")
    assert "resuming from" not in said
    again = sweeper.recorded("train")
    assert again["deps"] == swept["deps"] and again["params"] == swept["params"]
    outs = {out["path"]: out["md5"] for out in swept["outs"]}
    assert outs["data/models/adapter"] == sweeper.outputs()["data/models/adapter"]
    sweeper.run("git", "checkout", "-q", ".")


def test_mlflow_has_the_sweep_and_each_training_once(sweeper: Sweeper) -> None:
    runs = tracked(sweeper)
    trainings = [run for run in runs if TRAIN_KEY in run.tags]
    trials = [run for run in runs if TRIAL in run.tags]
    (parent,) = [run for run in runs if KEY in run.tags]
    assert len(runs) == len(trainings) + len(trials) + 1
    assert {run.status for run in runs} == {"FINISHED"}
    assert {run.tags[PARENT] for run in trials} == {parent.id}
    assert {run.tags[TRAINING] for run in trials} == {run.id for run in trainings}
    for kind in (trainings, trials):
        rates = Counter(run.params["trainer.learning_rate"] for run in kind)
        assert rates == {"0.001": 1, "0.004": 1}
    store = Store.open(sweeper.root, "capas")
    for run in (*trainings, *trials):
        assert "tuned.exact_match" in run.metrics
        points = store.client.get_metric_history(run.id, "train/loss")
        assert [p.step for p in points] == sorted({p.step for p in points})
        assert points[-1].step == LAST_STEP


def test_the_same_sweep_again_changes_nothing(sweeper: Sweeper) -> None:
    before = {run.id: run.end_time for run in tracked(sweeper)}
    said = sweeper.sweep(*WORDS)
    assert said.count("(had it)") == 2
    assert {run.id: run.end_time for run in tracked(sweeper)} == before
