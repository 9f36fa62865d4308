"""What a user types: a training that goes on from an adapter, and one of all weights, by DVC itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from workspace import Workspace, make_workspace, stages_run

from capas.tracking.store import Store

AFTER_TRAIN = ["train", "evaluate", "sample", "report", "publish"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """`experiment: quick`, trained, and its adapter kept in a folder that git ignores."""
    workspace = make_workspace(tmp_path_factory.mktemp("journeys"))
    workspace.edit("conf/config.yaml", "experiment: none", "experiment: quick")
    (workspace.root / ".git/info/exclude").write_text("/kept/\n")
    workspace.repro()
    workspace.run("cp", "-rL", "data/models/adapter", "kept")
    workspace.commit()
    return workspace


def sha256(workspace: Workspace, path: str) -> str:
    return hashlib.sha256((workspace.root / path).read_bytes()).hexdigest()


def newest(workspace: Workspace) -> Any:
    """The last run."""
    store = Store.open(workspace.root, "capas")
    return store.client.search_runs([store.experiment_id])[0]


def test_a_training_goes_on_from_an_adapter(first: Workspace) -> None:
    kept = sha256(first, "kept/adapter_model.safetensors")
    base = first.outputs()["data/models/base"]
    options = ["-S", "lora.adapter_name_or_path=kept"]
    log = first.run("dvc", "exp", "run", *options)
    assert stages_run(log) == ["compose", "fetch_model", *AFTER_TRAIN]
    assert "training starts from the adapter kept" in log
    pinned = first.read("conf/revisions.yaml")
    assert '"adapters":\n  "kept": "' in pinned
    facts = json.loads(first.read("reports/certificate.json"))
    assert facts["initial_adapter"]["sha256"] == kept
    assert facts["adapter_sha256"] != kept
    assert first.outputs()["data/models/base"] == base
    assert newest(first).tags["initial_adapter.sha256"] == kept
    assert stages_run(first.repro()) == []

    first.run("cp", "-rL", "--remove-destination", "data/models/adapter/.", "kept")
    assert stages_run(first.repro()) == [], "pinned: the adapter that was fetched is used"
    first.run("python", "stages/compose_params.py", "--update-revisions")
    assert first.read("conf/revisions.yaml") != pinned
    assert stages_run(first.repro()) == ["compose", "fetch_model", *AFTER_TRAIN]
    facts = json.loads(first.read("reports/certificate.json"))
    assert facts["initial_adapter"]["sha256"] == sha256(first, "kept/adapter_model.safetensors")
    assert facts["initial_adapter"]["sha256"] != kept

    said = first.run("dvc", "exp", "run", "-S", "lora.r=8", check=False)
    assert "lora.r=8, the adapter has 16. Set lora.r=16" in said
    first.run("python", "stages/compose_params.py", "--reset")


def test_all_weights_are_trained(first: Workspace, tmp_path: Path) -> None:
    options = ["-S", "lora=none", "-S", "quantization=none"]
    said = first.run("dvc", "exp", "run", "-S", "lora=none", check=False)
    assert "quantization=none where all weights are trained" in said
    first.run("dvc", "exp", "run", *options)
    assert "preset: none" in first.read("params.yaml")
    model = sha256(first, "data/models/adapter/model.safetensors")
    assert json.loads(first.read("reports/certificate.json"))["model_sha256"] == model
    assert newest(first).tags["adapter.sha256"] == model
    assert stages_run(first.repro()) == []

    asked = first.run("sh", "-c", "echo 'Set a timer for 5 minutes.' | capas chat")
    assert asked.strip()
    refused = first.run("capas", "merge", str(tmp_path / "merged"), check=False)
    assert "AutoModelForCausalLM.from_pretrained: data/models/adapter" in refused
    code = (
        "import mlflow, pandas as pd, sys; m = mlflow.pyfunc.load_model(sys.argv[1]); "
        "print(list(m.predict(pd.DataFrame({'prompt': ['Hi']}))['completion']))"
    )
    run_id = newest(first).id
    assert "[" in first.run(
        "python", "-c", code, f"runs:/{run_id}/model", MLFLOW_TRACKING_URI=uri(first)
    )
    first.commit()
    rebuilt = first.run("capas", "rebuild", run_id)
    assert "identical, byte for byte" in rebuilt


def uri(workspace: Workspace) -> str:
    return f"sqlite:///{workspace.root / 'mlflow.db'}"
