"""`capas compare` with runs of MLflow: by name, and read from the local database without MLflow."""

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from comparing import Results, answered

from capas import __main__ as cli
from capas.compare.repository import Repository, open_repository
from capas.compare.tracked import Tracked, read_runs
from capas.core.dag import recorded, recorded_key
from capas.core.params import flatten
from capas.tracking.run_content import artifacts_digest
from capas.tracking.run_params import clipped
from capas.tracking.store import Store


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_db: Path) -> Iterator[Results]:
    """HEAD has 3 of 10 right; the first run, in MLflow alone, had 5; `wide` is an experiment and a run."""
    results = Results.make(tmp_path_factory.mktemp("runs") / "results")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT", "CAPAS_HOME"):
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", "80")
        patch.chdir(results.root)
        shutil.copy(empty_mlflow_db, results.root / "mlflow.db")
        store = Store.open(results.root, "capas")
        results.record(answered(5), ["lora.r=64"])
        publish(results, store, "train-first", 0.5, seconds=50.0)
        results.record(answered(9), ["lora.r=32"])
        publish(results, store, "wide", 0.9, seconds=90.0)
        results.run("git", "checkout", "-q", "--", ".", check=False)
        shutil.rmtree(results.root / "reports")
        results.record(answered(3), seconds=12.0)
        results.commit()
        results.record(answered(9), ["lora.r=32"])
        results.experiment("wide")
        results.reset()
        yield results


def publish(results: Results, store: Store, name: str, score: float, seconds: float) -> None:
    """What the publish stage sends, as far as `compare` reads it."""
    from mlflow.entities import Metric, Param

    lock = recorded(results.root)
    tags = {
        "train_key": recorded_key(lock["train"]),
        "capas.artifacts": artifacts_digest(lock),
    }
    run = store.client.create_run(store.experiment_id, run_name=name, tags=tags)
    run_id = run.id
    numbers = {
        "tuned.exact_match": score,
        "tuned.loss": 0.5,
        "difference.loss.low": -1.0,
        "difference.exact_match.low": score,
        "base.exact_match": 0.0,
        "seconds.train": seconds,
    }
    metrics = [Metric(key, value, 1, 0) for key, value in numbers.items()]
    params = clipped(flatten(lock["train"]["params"]["params.yaml"]))
    store.client.log_batch(run_id, metrics, [Param(k, v) for k, v in params.items()])
    for file in ("dvc.lock", "params.yaml"):
        store.client.log_artifact(run_id, str(results.root / file))
    store.client.log_text(run_id, json.dumps(table(results)), "predictions.json")
    store.client.set_terminated(run_id, "FINISHED")


def table(results: Results) -> dict[str, list[object]]:
    """As `publish` writes it: predictions without the number of tokens."""
    found = Repository(results.root, results.root).workspace().predictions
    assert found is not None
    columns = ["id", "prompt", "reference", "exact_match", "loss"]
    data = [[*(row[c] for c in columns), "base", row["completion"]] for row in found.rows]
    return {"columns": [*columns, "base", "tuned"], "data": data}


def facts(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert cli.main(["compare", *words, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("word", ["train-first", "run:train-first"])
@pytest.mark.parametrize("where", ["here", "on a server"])
def test_a_run_by_its_name(
    published: Results,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    where: str,
) -> None:
    """Read from the disk, or asked of MLflow where its artifacts are elsewhere."""
    if where != "here":
        monkeypatch.setattr(Tracked, "folder", None)
    found = facts(capsys, word, "HEAD")
    a, difference = found["a"], found["difference"]
    assert isinstance(a, dict) and isinstance(difference, dict)
    assert (a["kind"], a["name"], a["seconds"]) == ("run", "train-first", {"train": 50.0})
    assert (difference["before"], difference["after"]) == (0.5, 0.3)
    assert found["params"] == {"lora.r": ["64", "16"]}


def test_answers_of_a_run_that_dvc_has_no_more(
    published: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the run's table; without the numbers of tokens there is no interval of the loss."""
    monkeypatch.setattr("capas.compare.outputs.Outputs.find", lambda self, path: None)
    found = facts(capsys, "run:train-first", "wide")
    difference = found["difference"]
    assert isinstance(difference, dict)
    assert (difference["mean"], difference["num_records"]) == (pytest.approx(0.4), 10)
    assert found["loss_difference"] is None


def test_the_list_has_the_first_run_that_no_commit_has(
    published: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[-8:] if line and line[0].isalpha()}
    assert rows["train-first"] == [
        *("train-first", "64", "50.0", "%", "+20.0", "(0.0", "to", "70.0)", "0.5", "50"),
    ]
    assert rows["wide"][-1] == "90"  # seconds: MLflow's
    assert [line.split()[0] for line in lines if "train-first" in line or "wide" in line] == [
        "wide",
        "train-first",
    ]


def test_the_run_of_an_experiment_is_no_row_of_its_own(published: Results) -> None:
    """Its name says what differs, so the experiment's name is a tag."""
    with open_repository(published.root) as repository:
        first = next(run for run in repository.tracked if run.name == "train-first")
        named = replace(first, name="r64 (wide)", texts={**first.texts, "dvc.experiment": "wide"})
        repository.tracked = [named]
        assert [one.name for one in repository.experiments] == ["wide"]
        assert repository.unlisted_runs([]) == []
        repository.tracked = [first]
        assert [side.name for side in repository.unlisted_runs([])] == ["train-first"]


def test_a_run_without_artifacts_here_is_listed_with_its_scores(
    published: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracked, "folder", None)
    assert cli.main(["compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in lines if line.startswith("train-first"))
    assert row == ["train-first", "64", "50.0", "%", "–", "0.5", "50"]


def test_a_database_that_cannot_be_read_is_left_out(
    published: Results, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results = Results(Path(shutil.copytree(published.root, tmp_path / "results", symlinks=True)))
    with sqlite3.connect(results.root / "mlflow.db") as base:
        base.execute("drop table latest_metrics")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(results.root)
        assert cli.main(["compare", "HEAD", "wide"]) == 0
    said = capsys.readouterr()
    assert "MLflow is left out" in said.err and "no such table: latest_metrics" in said.err
    assert "exact match 30.0 % -> 90.0 %" in said.out


def test_neither_torch_nor_mlflow_is_imported(published: Results) -> None:
    code = (
        "import sys; from capas.__main__ import main; main(['compare', 'HEAD', 'wide']); "
        "print({'torch', 'transformers', 'mlflow', 'pandas'} & {*sys.modules})"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=published.root, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines()[-1] == "set()"


def test_a_comparison_names_its_page_in_mlflow(
    published: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where MLflow has a run for each; the workspace's result is not published here."""
    first, second = (run.run_id for run in reversed(read_runs(published.root)))
    page = facts(capsys, "train-first", "run:wide")["mlflow"]
    assert isinstance(page, str)
    words = dict(word.split("=") for word in page.partition("?")[2].split("&"))
    assert json.loads(unquote(words["runs"])) == [first, second]
    assert json.loads(unquote(words["experiments"])) == ["1"]
    assert cli.main(["compare", "train-first", "run:wide"]) == 0
    assert f"In MLflow: {page}   (served by `make ui`)" in capsys.readouterr().out
    assert "mlflow" not in facts(capsys, "train-first", "workspace")
    assert "mlflow" not in facts(capsys, "train-first", "train-first")
