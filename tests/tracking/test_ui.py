"""MLflow's pages: addresses, the shared view, and names that tell runs apart."""

import json
import socket
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from capas import __main__ as cli
from capas.tracking import pages, run_params, ui
from capas.tracking.pages import Pages
from capas.tracking.store import Store, sweeps_of

PARAMS = {
    **{"dataset.preset": "own_csv", "model.preset": "qwen2.5_0.5b_instruct"},
    **{"quantization.preset": "nf4", "lora.preset": "all_linear", "lora.r": "8"},
    **{"trainer.learning_rate": "0.0002", "trainer.num_train_epochs": "2.0"},
}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "own_csv qwen2.5-0.5b r8 lr2e-4"),
        ({"trainer.learning_rate": "0.00015"}, "own_csv qwen2.5-0.5b r8 lr1.5e-4"),
        ({"lora.preset": "none", "lora.r": "None"}, "own_csv qwen2.5-0.5b full lr2e-4"),
        ({"quantization.preset": "int8"}, "own_csv qwen2.5-0.5b int8 r8 lr2e-4"),
        ({"dataset.preset": "embedded", "model.preset": "embedded"}, "embedded r8 lr2e-4"),
    ],
)
def test_a_name_says_data_model_rank_and_rate(changes: dict[str, str], name: str) -> None:
    assert run_params.name_of({**PARAMS, **changes}) == name


def test_a_second_run_of_that_name_says_what_differs() -> None:
    name = "own_csv qwen2.5-0.5b r8 lr2e-4"
    others = {name: PARAMS}
    longer = {**PARAMS, "trainer.num_train_epochs": "3.0"}
    assert run_params.distinct_name(longer, {}) == name
    assert run_params.distinct_name(longer, others) == f"{name} num_train_epochs=3.0"
    assert run_params.distinct_name(PARAMS, others) == f"{name} #2"  # say, other code
    assert run_params.distinct_name(PARAMS, {**others, f"{name} #2": {}}) == f"{name} #3"


def test_addresses_open_the_view_of_trainings() -> None:
    pages = Pages("sqlite:////somewhere/mlflow.db", "7", port=5001)
    base = "http://127.0.0.1:5001/#/experiments/7/runs"
    assert pages.runs() == f"{base}?viewStateShareKey=capas&workflowType=machine_learning"
    assert pages.run("abc") == f"{base}/abc?workflowType=machine_learning"
    words = parse_qs(pages.runs("sweep-1", charts=True).partition("?")[2])
    assert (words["viewStateShareKey"], words["compareRunsMode"]) == (["sweep-1"], ["CHART"])
    assert pages.runs(view="") == f"{base}?workflowType=machine_learning"
    assert "make ui" in pages.hint()


def test_the_pages_of_a_server_are_its_own_and_hold_no_password() -> None:
    pages = Pages("https://ana:secret@mlflow.example.com/tracking/", "7")
    assert pages.runs().startswith("https://mlflow.example.com/tracking/#/experiments/7/runs?")
    assert pages.hint() == ""


def test_every_experiment_has_the_view_also_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    store, tag = Store.open(tmp_path, "new"), pages.VIEW_TAG + pages.VIEW
    for _ in range(2):
        view = json.loads(store.client.get_experiment(store.experiment_id).tags[tag])
        assert view["columnOrder"][:3] == [
            f"metrics.`{n}`" for n in ("score", "base_score", "tuned.loss")
        ]
        assert {"params.`lora.r`", "params.`dataset.preset`"} < set(view["selectedColumns"])
        store.client.set_experiment_tag(store.experiment_id, tag, "of an older capas")
        store = Store.open(tmp_path, "new")


def test_the_sweeps_have_an_address_once_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ui, "_serve", lambda uri, port: 0)
    (tmp_path / "params.yaml").write_text("tracking: {experiment_name: capas}\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert cli.main(["ui", "--port", port]) == 0
    assert "\nsweeps " not in capsys.readouterr().out
    sweeps = Store.open(tmp_path, sweeps_of("capas"))
    assert cli.main(["ui", "--port", port]) == 0
    address = f"sweeps   http://127.0.0.1:{port}/#/experiments/{sweeps.experiment_id}/runs?workflow"
    assert address in capsys.readouterr().out


def test_a_port_that_is_in_use_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("tracking: {experiment_name: capas}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["ui", "--port", str(port)]) == 2
    assert (
        f"port {port} is in use. Choose another: make ui PORT={port + 1}" in capsys.readouterr().err
    )
    assert not (tmp_path / "mlflow.db").exists()
    assert cli.main(["ui", "--port", "70000"]) == 2
