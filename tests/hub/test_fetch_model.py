"""Weights from the embedded folder, a local one and the Hub: safetensors of a causal model or a refusal."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import REPOSITORY, make_model, run_stage

from capas.core.errors import CapasError
from capas.core.links import place
from capas.hub.sources import folder_revision
from stages import fetch_model

COMMIT = "0123456789" * 4


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace whose data/embedded is a tiny random model, and the same model in a folder of its own."""
    (tmp_path / "dvc.yaml").write_text((REPOSITORY / "dvc.yaml").read_text())
    for folder in ("data/embedded", "local"):
        make_model().save_pretrained(tmp_path / folder)
    files = {file.name: digest(file) for file in (tmp_path / "data/embedded").iterdir()}
    manifest = {"files": {name: {"sha256": sha256, "bytes": 0} for name, sha256 in files.items()}}
    (tmp_path / "data/embedded/manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def fetch(root: Path, name: str, revision: str | None = None) -> list[str]:
    revision = folder_revision(root / name) if name == "local" and revision is None else revision
    model = {"model_name_or_path": name, "revision": revision, "trust_remote_code": False}
    lora = {"adapter_name_or_path": None, "adapter_revision": None}
    lines = [f"model: {json.dumps(model)}", f"lora: {json.dumps(lora)}"]
    (root / "params.yaml").write_text("\n".join(lines))
    run_stage("fetch_model", fetch_model.main, root)
    return sorted(file.name for file in (root / "data/models/base").iterdir())


@pytest.mark.parametrize("name", ["data/embedded", "local"])
def test_files_are_those_of_the_model(root: Path, name: str) -> None:
    assert fetch(root, name) == ["config.json", "generation_config.json", "model.safetensors"]
    found = root / "data/models/base/model.safetensors"
    assert digest(found) == digest(root / name / "model.safetensors")
    assert not found.samefile(root / name / "model.safetensors"), (
        "an edit there must not reach DVC's cache"
    )


def test_damaged_embedded_file_is_refused(root: Path) -> None:
    with (root / "data/embedded/model.safetensors").open("ab") as weights:
        weights.write(b"x")
    with pytest.raises(CapasError, match=r"model.safetensors is not the file shipped"):
        fetch(root, "data/embedded")


def test_pickle_is_refused_by_name(root: Path) -> None:
    (root / "local/model.safetensors").rename(root / "local/pytorch_model.bin")
    with pytest.raises(CapasError, match=r"only as pytorch_model.bin.*save_pretrained"):
        fetch(root, "local")


def test_missing_shard_is_refused(root: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (root / "local/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CapasError, match=r"names missing files: model-00002-of-00002.safetensors"):
        fetch(root, "local")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "encoder-only"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quant_method=gptq, and .* gptqmodel"),
        ({"architectures": ["T5Model"], "is_encoder_decoder": True}, "encoder-decoder"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
            r"local is a mixture of experts \(MixtralForCausalLM.*num_local_experts=8.*dense model",
        ),
    ],
)
def test_model_that_cannot_be_tuned_is_refused(
    root: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((root / "local/config.json").read_text())
    (root / "local/config.json").write_text(json.dumps(config | change))
    with pytest.raises(CapasError, match=message):
        fetch(root, "local")


def test_hub_gives_only_what_was_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(root / "local")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fetch(root, "org/name", COMMIT)
    assert (asked["name"], asked["revision"]) == ("org/name", COMMIT)
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])
    found = root / "data/models/base/model.safetensors"
    assert found.stat().st_nlink == 2 or not found.samefile(root / "local/model.safetensors")


def test_pickles_on_the_hub_are_refused_by_name(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "local/model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(root / "local"))
    monkeypatch.setattr(
        "huggingface_hub.list_repo_files", lambda *a, **k: ["config.json", "pytorch_model.bin"]
    )
    with pytest.raises(CapasError, match=r"org/name has its weights only as pytorch_model.bin"):
        fetch(root, "org/name", COMMIT)


def test_what_cannot_be_trained_is_refused_before_its_weights_come(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(root / "local")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    file = root / "local/config.json"
    quantized = {"quantization_config": {"quant_method": "awq"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantized))
    with pytest.raises(CapasError, match=r"org/name cannot be trained.*quant_method=awq"):
        fetch(root, "org/name", COMMIT)
    assert asked == [["config.json"]]


def test_a_bitsandbytes_model_is_fetched(root: Path) -> None:
    file = root / "local/config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    assert "model.safetensors" in fetch(root, "local")


@pytest.mark.parametrize("revision", [None, "main", "0123456"])
def test_revision_that_may_move_is_refused(root: Path, revision: str | None) -> None:
    with pytest.raises(CapasError, match="is not a commit of org/name"):
        fetch(root, "org/name", revision)


def test_path_that_is_not_there_is_no_hub_id(root: Path) -> None:
    with pytest.raises(CapasError, match="neither a folder here nor the id"):
        fetch(root, "./models/missing")


def test_no_network_is_said_in_words(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CapasError, match=r"(?s)could not be downloaded: offline.*model=embedded"):
        fetch(root, "org/name", COMMIT)


def test_placing_never_lets_an_edit_through(tmp_path: Path) -> None:
    """A file that may be written to is copied (or cloned); one that nobody writes to is linked."""
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    assert place(source, tmp_path / "first") in ("reflink", "copy")
    source.write_bytes(b"changed")
    assert (tmp_path / "first").read_bytes() == b"weights"
    source.chmod(0o444)
    assert place(source, tmp_path / "second") in ("reflink", "hardlink")
    assert (tmp_path / "second").read_bytes() == b"changed"


def test_a_folder_is_pinned_to_what_is_in_it(root: Path) -> None:
    pinned = folder_revision(root / "local")
    (root / "local/notes.txt").write_text("no file of the model")
    fetch(root, "local", pinned)
    (root / "local/generation_config.json").write_text("{}")
    with pytest.raises(CapasError, match=f"revision={pinned}: local is a folder") as refusal:
        fetch(root, "local", pinned)
    fetch(root, "local", str(refusal.value).rpartition(" ")[2])


def test_the_tokenizer_of_a_folder_is_pinned_apart_from_its_weights(root: Path) -> None:
    before = folder_revision(root / "local").split("-")
    (root / "local/model.safetensors").write_bytes(b"")
    after = folder_revision(root / "local").split("-")
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)
