"""Publishing: one complete run, whatever was there before, and nothing twice."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from published import MARKER, edit, publish, published, the_run
from report_inputs import write_inputs

from capas.compare.repository import open_repository
from capas.core.dag import StageSpec, read_yaml, recorded
from capas.core.errors import CapasError
from capas.core.stage import Stage
from capas.tracking import run_content, run_params
from capas.tracking.client import Point
from capas.tracking.live_sender import points_of
from capas.tracking.store import ARTIFACTS, GATE, TRAIN_KEY, Store, existing, tracking_uri
from stages import publish_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A published result that no test changes for the next."""
    yield from published(tmp_path_factory.mktemp("publish"))


@pytest.fixture
def own(tmp_path: Path, empty_mlflow_db: Path) -> Iterator[Path]:
    """A published result of the test's own, to change."""
    shutil.copy(empty_mlflow_db, tmp_path / "mlflow.db")
    yield from published(tmp_path)


def whole(store: Store, run_id: str) -> Any:
    """A run as MLflow itself has it."""
    return store.client._client.get_run(run_id)


def table(root: Path, name: str) -> Any:
    """As MLflow reads what `mlflow.log_table` wrote."""
    import mlflow

    mlflow.set_tracking_uri(tracking_uri(root))
    store, found = the_run(root)
    return store.client.load_table(store.experiment_id, name, [found.id])


def test_the_run_holds_params_metrics_and_where_it_comes_from(root: Path) -> None:
    _, data = the_run(root)
    assert data.status == "FINISHED"
    assert data.params["lora.r"] == "16"
    assert data.params["dataset.num_train"] == "6000"
    assert data.params["evaluation.batch_size"] == "64"
    assert "'greedy.do_sample': False" in data.params["generation.settings"]
    assert data.params["model.preset"] == "embedded"  # after which `capas register` names the model
    assert not [name for name in data.params if name.startswith(("environment.", "tracking."))]
    assert data.tags["mlflow.source.git.commit"]
    assert data.tags["gate"] == "passed"
    assert data.metrics["score"] == data.metrics["tuned.exact_match"] == 0.5
    assert data.metrics["base_score"] == data.metrics["base.exact_match"] == 0.0
    assert data.metrics["tuned.exact_match by kind.seen"] == 0.5
    assert data.metrics["difference.loss.mean"] == -3.0
    assert data.metrics["general.difference.mean"] == 0.7
    assert data.metrics["seconds.train"] == data.metrics["seconds.all_stages"] == 12.5
    assert data.metrics["estimated_memory_bytes.train"] == 900
    assert data.metrics["peak_memory_bytes.train"] == 1000


def test_what_is_seen_first_is_what_people_compare(root: Path) -> None:
    """Charts: a section for each word before a slash, and those of the curves alone."""
    store, found = the_run(root)
    with_slash = {name.partition("/")[0] for name in found.metrics if "/" in name}
    assert with_slash == {"train", "validation"}
    assert len(found.metrics) < 70
    assert len(found.tags) < 20
    assert found.tags["mlflow.note.content"].startswith(
        "**exact_match 0.5** on 10 test records (base 0"
    )
    assert list(table(root, "predictions.json").columns[:4]) == [
        "prompt",
        "reference",
        "tuned",
        "base",
    ]
    columns = ["prompt", "model", "completion", "reference"]
    assert list(table(root, "samples.json").columns[:4]) == columns
    file = store.client.download_artifacts(found.id, "numbers.json")
    numbers = json.loads(Path(file).read_text())
    assert numbers["difference.loss.num_records_needed"] == 12
    assert "seconds.format" not in numbers  # DVC restored it: that was the cost of other inputs


def test_capas_compare_reads_what_was_published(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _, found = the_run(root)
    with open_repository(root) as repository:
        side = repository.find(found.id)
    assert side.kind == "run"
    assert (side.metrics["exact_match"], side.baseline["exact_match"]) == (0.5, 0.0)
    assert side.metrics_named[0] == "exact_match"  # the headline
    assert side.seconds["train"] == 12.5


def test_the_run_says_when_and_who_and_what(root: Path) -> None:
    _, found = the_run(root)
    assert found.name == "embedded r16 lr4e-3"
    assert (found.start_time, found.end_time) == (1_700_000_000_000, 1_700_000_012_500)
    assert found.tags["mlflow.user"] == "Ana García"


def test_the_curve_is_the_recorded_one(root: Path) -> None:
    store, found = the_run(root)
    curve = store.client.get_metric_history(found.id, "train/loss")
    assert [(m.step, m.value) for m in curve] == [
        (s, pytest.approx(3 / s)) for s in range(10, 101, 10)
    ]
    assert len(store.client.get_metric_history(found.id, "validation/loss")) == 2


def test_a_score_of_answers_has_one_name_live_and_recorded(tmp_path: Path) -> None:
    live = {
        "step": 50,
        "epoch": 2.0,
        "eval_exact_match": 0.5,
        "eval_loss": 0.2,
        "eval_runtime": 3.1,
    }
    (tmp_path / "history.csv").write_text("step,epoch,loss\n")
    (tmp_path / "validation.csv").write_text("step,epoch,loss,exact_match\n50,2.0,0.2,0.5\n")
    stage: Any = SimpleNamespace(dep=lambda file: tmp_path / Path(file).name)
    scores = [Point("validation/exact_match", 50, 0.5), Point("validation/loss", 50, 0.2)]
    assert sorted(run_content.curve(stage)) == scores
    assert sorted(points_of(live)) == [Point("train/epoch", 50, 2.0), *scores]


def test_the_datasets_carry_the_md5_of_dvc(root: Path) -> None:
    store, found = the_run(root)
    outs = {o["path"]: o["md5"] for e in recorded(root).values() for o in e["outs"]}
    inputs = {
        i.dataset.name: i.dataset.digest for i in whole(store, found.id).inputs.dataset_inputs
    }
    assert inputs == {
        f"data/formatted/{split}": outs["data/formatted"]
        for split in ("train", "validation", "test")
    }


def test_adapter_pages_and_tables_are_artifacts(root: Path) -> None:
    store, found = the_run(root)
    run_id = found.id
    names = {
        a.path
        for folder in ("", "adapter", "report", "model", "model/data/data", "model/code/capas/use")
        for a in store.client.list_artifacts(run_id, folder)
    }
    assert {"adapter/adapter_model.safetensors", "report/index.es.html", "dvc.lock"} <= names
    assert {"adapter/README.md", "model/MLmodel", "model/requirements.txt"} <= names
    assert {
        "model/data/data/base",
        "model/data/data/adapter",
        "model/code/capas/use/served_model.py",
    } <= names
    predictions = table(root, "predictions.json")
    assert len(predictions) == 10
    assert {"reference", "base", "tuned", "kind"} <= set(predictions.columns)
    assert set(table(root, "samples.json")["template"]) == {"right", "wrong"}


def test_a_second_publish_changes_nothing(root: Path) -> None:
    """Though the first took its time, which is in reports/timings by now."""
    store, before = the_run(root)
    recorded_before = whole(store, before.id).to_dictionary()
    edit(root / "reports/timings/publish.json", seconds=4.5)
    publish(root)
    _, after = the_run(root)
    assert after == before
    assert whole(store, after.id).to_dictionary() == recorded_before
    for name in ("train/loss", "tuned.exact_match"):
        history = store.client.get_metric_history(before.id, name)
        assert len(history) == len({m.step for m in history})


def test_the_model_written_anew_is_the_same_bytes(own: Path) -> None:
    store, found = the_run(own)
    (folder,) = (own / "mlartifacts").glob("*/artifacts/model")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    before = {file: file.read_bytes() for file in files}
    for tag in (ARTIFACTS, publish_run.MODEL_TAG):
        store.client.set_tag(found.id, tag, "of an older publish")
    publish(own)
    assert len(before) > 30
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_new_evaluation_of_the_same_training_lands_on_its_run(own: Path) -> None:
    evaluation = json.loads((own / "reports/evaluation.json").read_text())
    edit(own / "reports/evaluation.json", tuned={**evaluation["tuned"], "exact_match": 0.75})
    lock = read_yaml(own / "dvc.lock")
    lock["stages"]["evaluate"]["params"]["params.yaml"]["evaluation.batch_size"] = 8
    lock["stages"]["fetch"]["params"]["params.yaml"]["dataset.licence"] = "mit"
    lock["stages"]["sample"]["outs"][0]["md5"] = "0" * 32
    (own / "dvc.lock").write_text(yaml.safe_dump(lock))
    publish(own)
    _, found = the_run(own)
    assert found.metrics["tuned.exact_match"] == 0.75
    assert found.tags["now.dataset.licence"] == "mit"
    assert len(table(own, "predictions.json")) == 10

    lock["stages"]["fetch"]["params"]["params.yaml"]["dataset.licence"] = "apache-2.0"
    (own / "dvc.lock").write_text(yaml.safe_dump(lock))
    publish(own)
    assert "now.dataset.licence" not in the_run(own)[1].tags


def test_long_values_and_odd_names_never_break_logging() -> None:
    clipped = run_params.clipped({"a.b": "x" * 9000, "top k=5": [1, 2], "none": None})
    assert len(clipped["a.b"]) == run_params.MAX_TEXT
    assert clipped["a.b"].endswith("(whole in params.yaml)")
    assert clipped["top k_5"] == "[1, 2]"
    assert clipped["none"] == "None"


def test_a_failure_leaves_a_failed_run_that_a_retry_completes(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise CapasError("the disk is gone")

    edit(own / "reports/train.json", train_key="another")
    with monkeypatch.context() as patch, pytest.raises(CapasError, match="the disk is gone"):
        patch.setattr(publish_run, "send_artifacts", broken)
        publish(own)
    store = Store.open(own, "capas")
    assert store.find("another").status == "FAILED"
    publish(own)
    assert store.find("another").status == "FINISHED"


def test_an_unreachable_server_is_reported_in_seconds(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (own / MARKER).unlink()
    started = time.monotonic()
    with pytest.raises(CapasError, match=r"(?s)no MLflow server answers.*dvc repro publish"):
        publish(own)
    assert time.monotonic() - started < 10
    assert not (own / MARKER).exists()


def test_tracking_that_is_off_leaves_the_marker_alone(tmp_path: Path) -> None:
    publish(write_inputs(tmp_path, ["tracking=none"]))
    assert (tmp_path / MARKER).read_text() == "tracking.enabled is false\n"
    assert not (tmp_path / "mlflow.db").exists()


def test_without_a_recorded_training_there_is_nothing_to_publish(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "dvc.lock").unlink()
    with pytest.raises(CapasError, match=r"dvc\.lock records no training yet"):
        publish(tmp_path)


def test_scores_of_labels_are_metrics_of_the_run(tmp_path: Path) -> None:
    root = write_inputs(tmp_path, ["evaluation=labels"])
    spec = StageSpec.read("publish", root)
    found = run_content.metrics(Stage(spec, root), {})
    assert found["tuned.label_balanced_accuracy"] == 0.5 and found["score"] == 0.5
    assert found["majority.label_balanced_accuracy"] == 0.5
    assert found["difference.label_macro_f1.low"] == -0.1
    note = run_content.headline(Stage(spec, root))["mlflow.note.content"]
    assert "always choosing the most frequent label 0.8" in note
    assert "| label_calibration_error | 0.15 | 0.15 |" in note
    assert "difference_to_majority.label_balanced_accuracy.mean" in run_content.numbers(
        Stage(spec, root), {}
    )


def test_a_store_of_artifacts_that_refuses_is_told_before_a_run_is_made(
    tmp_path: Path, empty_mlflow_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    root = write_inputs(tmp_path / "root")
    shutil.copy(empty_mlflow_db, root / "mlflow.db")
    client = existing(root)
    made = client.create_experiment("capas", artifact_location="s3://bucket/runs")
    with pytest.raises(CapasError, match=r"s3://bucket/runs, which refuses: .*AWS_ACCESS_KEY_ID"):
        publish(root)
    assert not client.search_runs([made])


def test_tags_keep_their_names() -> None:
    """They stand in users' stores: under another name every earlier run would be published once more."""
    names = (TRAIN_KEY, GATE, ARTIFACTS, publish_run.MODEL_TAG)
    assert names == ("train_key", "gate", "capas.artifacts", "capas.model")
