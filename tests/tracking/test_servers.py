"""One finished run for each training, over SQLite, an MLflow server and PostgreSQL, whatever breaks.

The training is a process that writes rows as the real one does; the follower and publish are the real ones.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from published import edit, publish
from report_inputs import write_inputs
from servers import Proxy, Server, postgres

from capas.core.dag import read_yaml
from capas.core.errors import CapasError
from capas.tracking import live_sender
from capas.tracking.registry import register
from capas.tracking.store import Store

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
TRAINING = """
import sys, time
from pathlib import Path
from capas.training.live_rows import tracker

first, last, end = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
with tracker(Path.cwd(), sys.argv[1], enabled=True) as rows:
    for step in range(first, last + 1):
        rows.append({"step": step, "loss": 3 / step, "learning_rate": 0.1, "epoch": step / 25})
    if end == "hangs":
        time.sleep(600)
    if end == "fails":
        raise SystemExit(1)
"""


@pytest.fixture(scope="module", params=["sqlite", "server", "postgres"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server | None]:
    """None stands for SQLite without a server."""
    folder = tmp_path_factory.mktemp("server")
    if request.param == "sqlite":
        yield None
        return
    sqlite = nullcontext(f"sqlite:///{folder / 'mlflow.db'}")
    with postgres() if request.param == "postgres" else sqlite as store:
        made = Server(folder, store)
        made.start()
        yield made
        made.kill()


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("http")
    made = Server(folder, f"sqlite:///{folder / 'mlflow.db'}")
    made.start()
    yield made
    made.kill()


@pytest.fixture
def proxy(root: Path, http: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way that the test takes to the server."""
    made = Proxy(http.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    yield made
    made.close()


@pytest.fixture
def root(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result, and its training's key; every test has an experiment of its own on a server."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT", "CAPAS_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(live_sender, "_RETRY_SECONDS", 0.5)
    monkeypatch.setattr(live_sender, "_SEND_SECONDS", 0.2)
    return write_inputs(tmp_path, [f"tracking.experiment_name='{request.node.name}'"])


def key_of(root: Path) -> str:
    return str(json.loads((root / "reports/train.json").read_text())["train_key"])


def open_store(root: Path) -> Store:
    return Store.open(root, read_yaml(root / "params.yaml")["tracking"]["experiment_name"])


def the_run(root: Path) -> tuple[Store, Any]:
    """There is one, and it is in nobody's trash."""
    store = open_store(root)
    (found,) = store.client.search_runs([store.experiment_id])
    return store, found


def steps(root: Path, name: str = "train/loss") -> list[int]:
    store, found = the_run(root)
    return [m.step for m in store.client.get_metric_history(found.id, name)]


def train(root: Path, first: int, last: int, end: str = "ends") -> "subprocess.Popen[bytes]":
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = [key_of(root), str(first), str(last), end]
    return subprocess.Popen(
        [sys.executable, "-c", TRAINING, *arguments], cwd=root, env=env, stderr=subprocess.DEVNULL
    )


def wait_for(root: Path, status: str, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        store = open_store(root)
        found = store.find(key_of(root))
        if found is not None and found.status == status:
            return found
        log = root / f".dvc/tmp/live/{key_of(root)}.log"
        said = log.read_text() if log.exists() else ""
        assert time.monotonic() < deadline, (found and found.status, said)
        time.sleep(0.3)


class Following:
    """`tracking.follow` in a thread of this process, which writes its rows."""

    def __init__(self, root: Path) -> None:
        self.rows = root / "rows.jsonl"
        self.rows.write_text("")
        stdin, self._parent = os.pipe()
        self.thread = threading.Thread(
            target=live_sender.follow, args=(root, key_of(root), self.rows, stdin), daemon=True
        )
        self.thread.start()

    def write(self, *rows: dict[str, Any]) -> None:
        with self.rows.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def steps(self, first: int, last: int) -> None:
        self.write(*({"step": step, "loss": 3 / step} for step in range(first, last + 1)))

    def end(self, event: str) -> None:
        self.write({"event": event})
        self.thread.join(timeout=120)
        assert not self.thread.is_alive()
        os.close(self._parent)


def test_one_run_however_often_it_is_trained_published_and_registered(
    root: Path, server: Server | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    killed = train(root, 1, 20, "hangs")
    wait_for(root, "RUNNING")
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=30)
    wait_for(root, "KILLED")
    assert train(root, 10, 100).wait(timeout=60) == 0
    found = wait_for(root, "FINISHED")
    store = open_store(root)
    live = store.client.get_metric_history(found.id, "train/loss")
    assert [m.step for m in live] == list(range(1, 101))

    publish(root)
    _, published = the_run(root)
    publish(root)
    assert the_run(root)[1] == published
    after = store.client.get_metric_history(found.id, "train/loss")
    assert [(m.step, m.timestamp) for m in after] == [(m.step, m.timestamp) for m in live]
    assert published.artifact_uri.startswith("mlflow-artifacts:" if server else "file:")

    check_artifacts(store, found.id, root)
    lock = (root / "dvc.lock").read_text()
    (root / "dvc.lock").write_text(lock.replace("apache-2.0", "mit"))
    edit(root / "reports/quantization.json", relative_error_mean=0.5)
    publish(root)
    _, again = the_run(root)
    assert again.tags["now.dataset.licence"] == "mit"
    assert again.metrics["quantization.relative_error_mean"] == 0.5
    name = f"model-of-{root.parent.name}"
    first, second = (register(root, found.id, name, "champion", force=False) for _ in range(2))
    assert (first.version, first.created, second.created) == ("1", True, False)


def check_artifacts(store: Store, run_id: str, root: Path) -> None:
    """They come back from where they went."""
    folder = root / "downloaded"
    folder.mkdir()
    for name in ("model/MLmodel", "adapter/README.md", "predictions.json", "dvc.lock"):
        file = Path(store.client.download_artifacts(run_id, name, str(folder)))
        assert file.stat().st_size > 100
    table = Path(store.client.download_artifacts(run_id, "predictions.json", str(folder)))
    assert len(json.loads(table.read_text())["data"]) == 10


def test_an_empty_store_is_filled_by_publish_alone(
    root: Path, server: Server | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `dvc pull`, or where train comes from DVC's cache: there was no training to follow."""
    if server is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    publish(root)
    assert the_run(root)[1].status == "FINISHED"
    assert steps(root) == list(range(10, 101, 10))


def test_a_server_that_is_down_costs_a_training_nothing(
    root: Path, http: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", http.uri)
    http.kill()
    started = time.monotonic()
    assert train(root, 1, 50).wait(timeout=60) == 0
    assert time.monotonic() - started < 20
    with pytest.raises(CapasError, match=r"(?s)no MLflow server answers.*dvc repro publish"):
        publish(root)
    http.start()
    publish(root)
    assert the_run(root)[1].status == "FINISHED"
    assert len(steps(root)) == 10


def test_a_server_that_dies_in_the_middle_gets_the_rest_when_it_is_back(
    root: Path, http: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", http.uri)
    following = Following(root)
    following.steps(1, 20)
    wait_for(root, "RUNNING")
    http.kill()
    following.steps(21, 60)
    time.sleep(2)  # the follower runs into it
    http.start()
    following.steps(61, 100)
    following.end("end")
    assert the_run(root)[1].status == "FINISHED"
    assert steps(root) == list(range(1, 101))
    publish(root)
    assert steps(root) == list(range(1, 101))


def test_a_run_whose_server_died_before_its_end_is_ended_when_it_is_back(
    root: Path, http: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", http.uri)
    following = Following(root)
    following.steps(1, 20)
    wait_for(root, "RUNNING")
    http.kill()
    following.write({"event": "failed"})
    time.sleep(2)
    assert following.thread.is_alive()
    http.start()
    following.thread.join(timeout=60)
    assert the_run(root)[1].status == "FAILED"


def test_a_publish_that_loses_its_server_is_completed_by_the_next(
    root: Path, http: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import publish_run

    monkeypatch.setenv("MLFLOW_TRACKING_URI", http.uri)

    def kill_it(*arguments: Any) -> None:
        http.kill()
        send(*arguments)

    send = publish_run.send_artifacts
    with monkeypatch.context() as patch, pytest.raises(CapasError, match="dvc repro publish"):
        patch.setattr(publish_run, "send_artifacts", kill_it)
        publish(root)
    http.start()
    assert the_run(root)[1].status == "FAILED"
    publish(root)
    store, found = the_run(root)
    assert found.status == "FINISHED"
    check_artifacts(store, found.id, root)


def test_a_slow_server_gets_one_run_with_everything_in_it(root: Path, proxy: Proxy) -> None:
    proxy.delay = 0.1
    assert train(root, 1, 100).wait(timeout=60) == 0
    wait_for(root, "FINISHED")
    publish(root)
    assert the_run(root)[1].status == "FINISHED"
    assert steps(root) == list(range(1, 101))


def test_an_answer_that_never_comes_makes_no_second_run(
    root: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client asks again; the server has made the run at the first time already."""
    proxy.swallow, proxy.swallow_times = b"runs/create", 1
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    publish(root)
    assert proxy.swallow_times == 0
    assert the_run(root)[1].status == "FINISHED"


def test_a_run_made_twice_without_any_answer_is_one_after_the_next_publish(
    root: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers to the request and to MLflow's own second try are both lost: two runs, known to nobody."""
    proxy.swallow, proxy.swallow_times = b"runs/create", 2
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    with pytest.raises(CapasError, match="cannot be used"):
        publish(root)
    store = open_store(root)
    assert len(store.client.search_runs([store.experiment_id])) == 2
    publish(root)
    assert the_run(root)[1].status == "FINISHED"
