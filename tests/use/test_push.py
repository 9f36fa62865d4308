"""`capas push`: what the Hub gets, against one on loopback that speaks its protocol."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, use

from capas import __main__ as cli
from capas.tracking.store import Store
from capas.use.card import for_hub

CARD = """---
library_name: peft
license: apache-2.0
---

# LoRA adapter of data/embedded, training k1

## Scores on the test split

table

## How to load it

MLflow

## How to rebuild it

`capas rebuild 42`

## Params of the training

params
"""
BASE = {"packed": True, "hub": False, "model_name_or_path": "data/embedded", "quantization": None}
NAME = "models/me/timer"
Make = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(tokens=("mine", "read")) as hub:
        hub.writers = ("mine",)
        use(hub, tmp_path / "home", monkeypatch, token="mine")
        yield hub


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow_db: Path) -> Path:
    """A repository whose training is the run k1."""
    shutil.copyfile(empty_mlflow_db, tmp_path / "mlflow.db")
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT", "CAPAS_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/train.json").write_text('{"train_key": "k1"}')
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(root: Path) -> Make:
    store = Store.open(root, "capas")

    def run(
        key: str = "k1", gate: str = "passed", weights: bytes = b"adapter", whole: bool = False
    ) -> str:
        folder = root / "made" / key / "model"
        data = folder / "data/data"
        adapter = data / "adapter"
        adapter.mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}")
        (data / "served.json").write_text(json.dumps({"base": BASE}))
        (data / "base").mkdir()
        (data / "base/model.safetensors").write_bytes(b"base of " + key.encode())
        start = "" if whole else "adapter_"
        (adapter / f"{start}model.safetensors").write_bytes(weights)
        (adapter / f"{start}config.json").write_text("{}")
        (adapter / "README.md").write_text(CARD)
        tags = {"train_key": key, "gate": gate, "adapter.sha256": f"sha of {key}"}
        made = store.client.create_run(store.experiment_id, tags=tags, run_name=f"run-{key}")
        store.client.log_artifacts(made.id, str(folder), "model")
        store.client.set_terminated(made.id)
        return str(made.id)

    return run


def push(*words: str) -> int:
    return cli.main(["push", "me/timer", *words])


def files(hub: Hub) -> dict[str, bytes]:
    repo = hub.repos[NAME]
    return repo.commits[repo.refs["main"]]


def test_the_adapter_its_base_and_its_card(hub: Hub, make: Make, capsys: Any) -> None:
    make()
    assert push() == 0
    found = files(hub)
    assert set(found) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        "base/model.safetensors",
    }
    assert found["adapter_model.safetensors"] == b"adapter"
    card = found["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "me/timer")' in card
    assert 'AutoModelForCausalLM.from_pretrained("me/timer", subfolder="base")' in card
    assert "## How to rebuild it\n\n`capas rebuild 42`" in card
    assert "MLflow" not in card
    assert not hub.repos[NAME].private
    assert capsys.readouterr().out.strip().startswith(f"{hub.url}/me/timer/commit/")


def test_a_whole_model_goes_without_base_and_peft(hub: Hub, root: Path, make: Make) -> None:
    made = Store.open(root, "capas").client
    run_id = make(whole=True)
    assert made.get_run(run_id).tags["gate"] == "passed"
    assert push() == 0
    found = files(hub)
    assert set(found) == {"README.md", "config.json", "model.safetensors"}
    card = found["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("me/timer")' in card
    assert "PeftModel" not in card
    assert push("--merged", str(root)) == 2


def test_the_same_again_is_no_second_commit(hub: Hub, make: Make) -> None:
    make()
    assert push("--private") == 0
    commits = dict(hub.repos[NAME].commits)
    assert hub.repos[NAME].private
    assert push() == 0
    assert hub.repos[NAME].commits == commits
    make("k2", weights=b"another")
    assert push("--run", "run-k2") == 0
    assert files(hub)["adapter_model.safetensors"] == b"another"
    assert len(hub.repos[NAME].commits) == len(commits) + 1


def test_a_merged_model(hub: Hub, make: Make, root: Path) -> None:
    make()
    folder = root / "merged"
    folder.mkdir()
    facts = {"dtype": "float32", "difference": 2e-6, "num_tokens": 9, "num_same_next_token": 9}
    (folder / "merge.json").write_text(json.dumps({**facts, "adapter_sha256": "sha of k1"}))
    (folder / "model.safetensors").write_bytes(b"merged")
    assert push("--merged", str(folder)) == 0
    found = files(hub)
    assert set(found) == {"README.md", "merge.json", "model.safetensors"}
    card = found["README.md"].decode()
    assert "library_name: transformers" in card
    assert "# With its LoRA adapter merged in: data/embedded" in card
    assert (
        "by at most 2e-06 of the largest; the most probable next token is the same for 9 of 9"
        in card
    )


def test_nothing_is_left_of_the_model_before(hub: Hub, make: Make, root: Path) -> None:
    """A merged model beside adapter_config.json would be loaded as the old adapter, on its base."""
    make()
    assert push() == 0
    hub.commit(NAME, {**files(hub), "plot.png": b"mine", "model-00001-of-00002.safetensors": b"x"})
    (root / "merged").mkdir()
    facts = {"dtype": "float32", "difference": 2e-6, "num_tokens": 9, "num_same_next_token": 9}
    (root / "merged/merge.json").write_text(json.dumps({**facts, "adapter_sha256": "sha of k1"}))
    (root / "merged/model.safetensors").write_bytes(b"merged")
    assert push("--merged", "merged") == 0
    assert set(files(hub)) == {"README.md", "plot.png", "merge.json", "model.safetensors"}
    assert push() == 0
    adapter = {"adapter_config.json", "adapter_model.safetensors", "base/model.safetensors"}
    assert set(files(hub)) == {"README.md", "plot.png", *adapter}


def test_merged_from_another_adapter_is_refused(
    hub: Hub, make: Make, root: Path, capsys: Any
) -> None:
    make()
    (root / "merged").mkdir()
    (root / "merged/merge.json").write_text('{"adapter_sha256": "sha of k2"}')
    assert push("--merged", "merged") == 2
    assert "was merged from the adapter sha of k2" in capsys.readouterr().err
    assert NAME not in hub.repos


def test_a_failed_gate_is_told_and_needs_force(hub: Hub, make: Make, capsys: Any) -> None:
    make(gate="failed: stop_rate 0.5")
    assert push() == 1
    assert "gate failed: stop_rate 0.5 (to override: --force)" in capsys.readouterr().err
    assert NAME not in hub.repos
    assert push("--force") == 0
    assert NAME in hub.repos


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("read", "your token has no write access there"),
        ("strange", "you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN"),
        (None, "you are not logged in to the Hub"),
    ],
)
def test_who_may_not_write_is_told_the_way_out(
    hub: Hub,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    token: str | None,
    told: str,
) -> None:
    make()
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert push() == 2
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err


def test_no_network_and_no_name(
    hub: Hub, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from huggingface_hub import hf_api

    make()
    assert cli.main(["push", "timer"]) == 2
    assert "'timer' is not a repository name: expected OWNER/NAME" in capsys.readouterr().err
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert push() == 2
    assert "the Hub cannot be reached" in capsys.readouterr().err


def test_the_card_names_the_base_as_it_was_in_the_training() -> None:
    asked = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    named = {"packed": False, "hub": True, "model_name_or_path": "org/x", "revision": "0123"}
    card = for_hub(CARD, "me/timer", {**named, "quantization": asked})
    assert "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')" in card
    assert 'from_pretrained("org/x", revision="0123", quantization_config=quantization)' in card
    local = for_hub(CARD, "me/timer", {**named, "hub": False, "quantization": None})
    assert "BASE is a folder with `org/x`, which is not on the Hub." in local
