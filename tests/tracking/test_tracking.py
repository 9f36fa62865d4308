"""Following a training live: one run, no step twice, the right end, and never a training disturbed."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capas.core.errors import CapasError
from capas.tracking import live_sender
from capas.tracking import store as stores
from capas.tracking.client import RETRY, Point, reachable
from capas.tracking.store import TRAIN_KEY, Store, locked, tracking_uri

Write = Callable[..., Path]
REPOSITORY = Path(__file__).parents[2]
PARAMS = (
    "{lora: {r: 8}, model: {preset: tiny}, tracking: {enabled: true, experiment_name: tests}}\n"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tracking")
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "dvc.yaml").write_text(
        "stages: {train: {cmd: train, params: [lora.r, model.preset]}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("DVC_EXP_NAME", raising=False)
        patch.setenv("DVC_ROOT", str(folder))
        patch.chdir(folder)
        yield folder


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def lines(*steps: int, event: str | None = None) -> Path:
        rows: list[dict[str, Any]] = [
            {"step": s, "loss": 1 / s, "learning_rate": 0.1, "epoch": s, "num_tokens": 9 * s}
            for s in steps
        ]
        rows += [{"event": event}] if event else []
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return lines


def follow(root: Path, key: str, rows: Path) -> str:
    """With a training that is already gone: its end of the pipe is closed."""
    stdin, parent = os.pipe()
    os.close(parent)
    try:
        return live_sender.follow(root, key, rows, stdin)
    finally:
        os.close(stdin)


def steps_of(root: Path, key: str) -> list[int]:
    store = Store.open(root, "tests")
    run = store.find(key)
    return [m.step for m in store.client.get_metric_history(run.id, "train/loss")]


def test_a_finished_training_is_one_finished_run(root: Path, write: Write) -> None:
    assert follow(root, "done", write(1, 2, 3, event="end")) == "FINISHED"
    run = Store.open(root, "tests").find("done")
    assert run.status == "FINISHED"
    assert run.metrics["train/loss"] == pytest.approx(1 / 3)
    assert run.params == {"lora.r": "8", "model.preset": "tiny"}
    assert run.name == "tiny r8"
    assert steps_of(root, "done") == [1, 2, 3]


@pytest.mark.parametrize(("event", "status"), [(None, "KILLED"), ("failed", "FAILED")])
def test_a_training_that_died_is_not_left_running(
    root: Path, write: Write, event: str | None, status: str
) -> None:
    assert follow(root, status, write(1, 2, event=event)) == status
    assert Store.open(root, "tests").find(status).status == status


def test_a_resumed_training_goes_on_in_its_run(root: Path, write: Write) -> None:
    follow(root, "resumed", write(1, 2, 3))
    follow(root, "resumed", write(1, 2, 3, 4, event="end"))
    assert steps_of(root, "resumed") == [1, 2, 3, 4]
    store = Store.open(root, "tests")
    found = store.client.search_runs([store.experiment_id], "tags.train_key = 'resumed'")
    assert [run.status for run in found] == ["FINISHED"]


def test_a_line_is_read_when_it_is_complete(root: Path, tmp_path: Path) -> None:
    rows = tmp_path / "half.jsonl"
    rows.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    follower = live_sender.Follower(root, "half", rows, "tests")
    follower.read()
    with rows.open("a") as file:
        file.write('ss": 1.0}\n{"event": "end"}\n')
    follower.read()
    assert follower.event == "end"
    assert [point.step for point in follower._waiting] == [1, 2]


def test_a_server_that_is_gone_costs_a_warning(
    root: Path, write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:secret@127.0.0.1:9")
    assert follow(root, "alone", write(1, event="end")) == "FINISHED"
    assert "training continues without live metrics" in caplog.text
    assert "secret" not in caplog.text


def test_points_that_the_run_has_are_not_logged_again(root: Path) -> None:
    store = Store.open(root, "tests")
    run_id = store.find_or_create("points", lambda: "points").id
    points = [Point("a", step, float(step)) for step in range(1500)]
    assert store.log_points(run_id, points) == 1500
    assert store.log_points(run_id, [*points, Point("a", 1500, 0.0)]) == 1


def test_a_new_run_counts_as_failed_until_it_is_ended(root: Path) -> None:
    assert Store.open(root, "tests").find_or_create("new", lambda: "new").status == "FAILED"


def test_a_run_whose_machine_lost_its_power_is_ended_by_the_next(root: Path, write: Write) -> None:
    store = Store.open(root, "tests")
    runs = {
        key: store.only(TRAIN_KEY, key, lambda: "a name").id for key in ("dead", "alive", "far")
    }
    assert {store.client.get_run(run_id).status for run_id in runs.values()} == {"RUNNING"}
    with locked(root, "dead", seconds=0):
        pass  # its process was here; of `far` nothing is known on this machine
    with locked(root, "alive", seconds=0):
        follow(root, "next", write(1, event="end"))
    found = {key: store.client.get_run(run_id).status for key, run_id in runs.items()}
    assert found == {"dead": "FAILED", "alive": "RUNNING", "far": "RUNNING"}


def test_of_several_runs_the_one_that_holds_something_stays(root: Path) -> None:
    store = Store.open(root, "tests")
    tags = {stores.TRAIN_KEY: "several"}
    empty, filled, late = (store.client.create_run(store.experiment_id, tags=tags) for _ in "123")
    store.client.log_metric(filled.id, "train/loss", 1.0)
    run = store.find_or_create("several", lambda: "several")
    assert (run.id, run.status) == (filled.id, "FAILED")
    for gone in (empty, late):
        assert store.client.get_run(gone.id).is_deleted


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:///HOME/mlflow.db"),
        ("sqlite+pysqlite:///../runs.db?timeout=9", "sqlite+pysqlite:///HOME/../runs.db?timeout=9"),
        ("file:mlruns", "file:HOME/mlruns"),
        ("file:./mlruns", "file:HOME/mlruns"),
        ("mlruns", "HOME/mlruns"),
        ("", "sqlite:///HOME/mlflow.db"),
        *((uri, uri) for uri in ("sqlite:////a/b.db", "sqlite:///:memory:", "sqlite://")),
        *((uri, uri) for uri in ("sqlite:///file:a.db?uri=true", "file:///a/b", "file:/a", "/a/b")),
        *((uri, uri) for uri in ("http://host:5000", "postgresql://ana@host/runs")),
        *((uri, uri) for uri in ("databricks", "databricks://ana", "databricks-uc", "uc", "uc:a")),
    ],
)
def test_a_relative_store_is_in_the_users_repository(
    given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    monkeypatch.setenv(stores.HOME, str(tmp_path))
    assert tracking_uri(tmp_path / "point") == expected.replace("HOME", str(tmp_path))


@pytest.mark.parametrize("name", ["what? now", "a%20b", "x#y", "a;b", "ñ+ &"])
def test_a_store_is_in_its_repository_whatever_that_is_called(
    name: str, tmp_path: Path, empty_mlflow_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / name
    root.mkdir()
    shutil.copy(empty_mlflow_db, root / "mlflow.db")
    monkeypatch.setenv(stores.HOME, str(root))
    store = Store.open(root, "tests")
    store.check_artifacts()
    run = store.client.create_run(store.experiment_id)
    store.client.log_text(run.id, "here", "note.txt")
    assert stores.sqlite_file(tracking_uri(root)) == root / "mlflow.db"
    assert stores.sqlite_file(stores.sqlite_uri(root / "a.db")) == root / "a.db"
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert list(root.glob("mlartifacts/*/artifacts/note.txt"))
    assert stores.existing(root).get_run(run.id).id == run.id


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("postgres://ana:hidden@host/x", "Use postgresql://USER:PASSWORD@HOST/NAME"),
        ("postgresql://ana:hidden@host/x", r"psycopg, .*or use postgresql\+psycopg2://"),
        ("mysql://ana:hidden@host/x", r"pip install mysqlclient; or use mysql\+pymysql://"),
        ("mysql+pymysql://ana:hidden@host/x", "pip install pymysql"),
        ("postgresql+psycopg2://ana:hid/den@host:5432/x", "escape / @ # : as %2F"),
        ("postgresql+psycopg2://ana:hidden@127.0.0.1:9/x", "no database answers at"),
        ("sqlite:////dev/null/mlflow.db", r"cannot be created: .*/dev/null"),
        ("sqlite:////dev", "refuses a connection: unable to open database file"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_at_once(
    uri: str, reason: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("psycopg", "MySQLdb", "pymysql"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with pytest.raises(CapasError, match=reason) as told:
        Store.open(root, "tests")
    assert time.monotonic() - started < 10
    assert "hid" not in str(told.value)


def test_a_relative_store_outlives_the_folder_of_a_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = tmp_path / "point"
    point.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    monkeypatch.setenv(stores.HOME, str(tmp_path))
    monkeypatch.chdir(point)
    Store.open(point, "tests").find_or_create("kept", lambda: "kept")
    assert (tmp_path / "runs.db").exists() and not list(point.iterdir())
    stores.existing(tmp_path)  # as `capas register` looks for it


@pytest.mark.slow  # MLflow waits for 20 seconds
def test_a_busy_database_is_reported_with_the_way_out(root: Path) -> None:
    store = Store.open(root, "tests")
    with sqlite3.connect(root / "mlflow.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        with (
            pytest.raises(CapasError, match=rf"(?s)cannot be used: .*locked.*{RETRY}"),
            reachable(tracking_uri(root)),
        ):
            store.find_or_create("busy", lambda: "busy")


TRAINING = """
import os, signal, sys, time
from pathlib import Path
from capas.training.live_rows import tracker

with tracker(Path.cwd(), sys.argv[1], enabled=True) as rows:
    for step in (1, 2):
        rows.append({"step": step, "loss": 1.0 / step})
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # mlflow is imported by every follower
@pytest.mark.parametrize(("end", "status"), [("killed", "KILLED"), ("finished", "FINISHED")])
def test_the_follower_outlives_the_training_and_ends_its_run(
    root: Path, end: str, status: str
) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", TRAINING, end, end], cwd=root, env=env, check=False)
    deadline = time.monotonic() + 60
    while (run := Store.open(root, "tests").find(end)) is None or run.status != status:
        assert time.monotonic() < deadline, (root / f".dvc/tmp/live/{end}.log").read_text()
        time.sleep(0.5)
    assert steps_of(root, end) == [1, 2]


@pytest.mark.slow
def test_two_processes_may_create_the_store_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    code = "from pathlib import Path; from capas.tracking.store import Store; Store.open(Path('.'), 'a')"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert (tmp_path / "mlflow.db").exists()


def test_a_deleted_experiment_names_the_way_back(root: Path) -> None:
    store = Store.open(root, "deleted")
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(CapasError, match=f"mlflow experiments restore -x {store.experiment_id}"):
        Store.open(root, "deleted")


def test_two_writers_of_one_run_take_turns(root: Path) -> None:
    with (
        locked(root, "turns", seconds=0),
        pytest.raises(CapasError, match="another process is writing"),
        locked(root, "turns", seconds=0.2),
    ):
        pass


def test_nothing_is_followed_where_tracking_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "params.yaml").write_text("tracking: {enabled: false, experiment_name: tests}\n")
    monkeypatch.chdir(tmp_path)
    live_sender.main(["follow", "--key", "k", "--rows", "none.jsonl"])
    assert "tracking.enabled is false" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_the_machine_is_watched_while_the_training_runs(
    root: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_sender, "_SAMPLE_SECONDS", 0.2)
    follower = live_sender.Follower(root, "watched", write(1), "tests")
    follower.read()
    follower.send()
    deadline = time.monotonic() + 30
    while (
        "system/cpu_utilization_percentage"
        not in (found := Store.open(root, "tests").find("watched")).metrics
    ):
        assert time.monotonic() < deadline
        follower.send("RUNNING")
        time.sleep(0.2)
    assert found.metrics["system/system_memory_usage_percentage"] > 0
    follower.send("FINISHED", now=True)
    assert not [t for t in threading.enumerate() if t.name == "SystemMetricsMonitor"]


def test_a_machine_that_cannot_be_watched_costs_a_warning(
    root: Path, write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no driver")

    module = pytest.importorskip("mlflow.system_metrics.system_metrics_monitor")
    monkeypatch.setattr(module, "SystemMetricsMonitor", broken)
    follower = live_sender.Follower(root, "unwatched", write(1, event="end"), "tests")
    follower.read()
    follower.send()
    follower.send("FINISHED", now=True)
    assert "no system metrics: no driver" in caplog.text
    assert steps_of(root, "unwatched") == [1]
