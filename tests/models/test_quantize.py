"""Quantization for real: what is kept, what is lost, what comes back from disk."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, read_json, run_stage, write_workspace
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.models.architecture import stored_quantization
from capas.models.loading import load_model, quantization_method
from capas.models.weights import read_weights
from stages import evaluate_model, quantize_model, train_lora

METHODS = ("nf4", "fp4", "int8")
PLAIN = Params({"dtype": "float32"})
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=METHODS)
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    root = write_workspace(
        tmp_path_factory.mktemp(request.param), [f"quantization={request.param}"]
    )
    run_stage("quantize", quantize_model.main, root)
    return request.param, root


def test_method_and_sizes_are_measured(quantized: tuple[str, Path]) -> None:
    method, root = quantized
    facts = read_json(root / "reports/quantization.json")
    assert facts["method"] == method
    assert facts["bytes_after"] < facts["bytes_before"]
    assert facts["skipped_modules"] == ["lm_head"]
    assert 0 < facts["num_quantized_parameters"] < facts["num_parameters"]


def test_error_of_every_layer(quantized: tuple[str, Path]) -> None:
    """Known for normal weights: about 0.1 with 16 levels, below 0.01 with 255."""
    method, root = quantized
    rows = list(csv.DictReader((root / "reports/quantization_error.csv").open()))
    low, high = (0.0, 0.02) if method == "int8" else (0.05, 0.2)
    assert len(rows) == 14
    assert all(low < float(row["relative_error"]) < high for row in rows)
    assert all(4 < float(row["bits"]) < 10 for row in rows)


def test_reloading_changes_nothing(quantized: tuple[str, Path]) -> None:
    method, root = quantized
    first, second = (load_model(root / "data/models/quantized", PLAIN, CPU) for _ in range(2))
    base = load_model(root / "data/models/base", PLAIN, CPU)
    ids = torch.arange(40).view(2, 20)
    assert (first(ids).logits - second(ids).logits).abs().max() == 0.0
    assert 0 < (first(ids).logits - base(ids).logits).abs().max() < 1
    assert quantization_method(first) == method


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def quantize(root: Path, *overrides: str, **config: Any) -> dict[str, Any]:
    """The stage on another base; returns reports/quantization.json."""
    base = write_workspace(root, overrides) / "data/models/base"
    if config:
        make_model(**config).save_pretrained(base)
    run_stage("quantize", quantize_model.main, root)
    return read_json(root / "reports/quantization.json")


def quantize_elsewhere(root: Path, **options: Any) -> dict[str, bytes]:
    """data/models/base as somebody else's bitsandbytes made it, on a CPU; returns its files."""
    base = root / "data/models/base"
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype="float32", **options)
    model = load_model(base, PLAIN, CPU, quantization_config=config)
    for file in base.iterdir():
        file.unlink()
    model.save_pretrained(base)
    return {file.name: file.read_bytes() for file in base.iterdir()}


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_keep_every_bit_tied_or_not(tmp_path: Path, tied: bool) -> None:
    facts = quantize(tmp_path, "quantization=nf4", tie_word_embeddings=tied)
    before, after = (
        load_file(tmp_path / f"data/models/{name}/model.safetensors")
        for name in ("base", "quantized")
    )
    assert (facts["tied_embeddings"], facts["skipped_modules"]) == (tied, ["lm_head"])
    kept = [name for name in before if "proj.weight" not in name]
    assert ("lm_head.weight" in kept) is not tied
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_shards_are_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_workspace(make_folder(tmp_path / "whole"), ["quantization=nf4"])
    run_stage("quantize", quantize_model.main, whole)
    shards = write_workspace(make_folder(tmp_path / "shards"), ["quantization=nf4"])
    (shards / "data/models/base/model.safetensors").unlink()
    make_model().save_pretrained(shards / "data/models/base", max_shard_size="50KB")
    monkeypatch.setattr("capas.models.loading.MAX_SHARD_SIZE", "30KB")
    run_stage("quantize", quantize_model.main, shards)
    facts = read_json(shards / "reports/quantization.json")
    assert facts["num_shards_before"] > 2 < facts["num_shards_after"]
    one, many = (load_model(r / "data/models/quantized", PLAIN, CPU) for r in (whole, shards))
    ids = torch.arange(20)[None]
    assert torch.equal(one(ids).logits, many(ids).logits)
    errors = [(r / "reports/quantization_error.csv").read_text() for r in (whole, shards)]
    assert errors[0] == errors[1]


STORED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("method", list(STORED))
def test_what_came_quantized_by_bitsandbytes_is_passed_on(tmp_path: Path, method: str) -> None:
    two_steps = [f"trainer.{k}={n}" for k, n in {"max_steps": 2, "logging_steps": 1}.items()]
    root = write_workspace(tmp_path, [f"quantization={method}", *two_steps])
    files = quantize_elsewhere(root, **STORED[method])
    run_stage("quantize", quantize_model.main, root)
    facts = read_json(root / "reports/quantization.json")
    assert (facts["method"], facts["came_quantized"]) == (method, True)
    assert facts["bytes_before"] == facts["bytes_after"]
    assert (root / "reports/quantization_error.csv").read_text() == "layer,relative_error,bits\n"
    quantized = root / "data/models/quantized"
    assert {file.name: file.read_bytes() for file in quantized.iterdir()} == files
    run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
    assert read_json(root / "reports/evaluation_base.json")["full_precision"] is None
    run_stage("train", train_lora.main, root)
    assert read_json(root / "reports/train.json")["used"]["quantization"] == method


@pytest.mark.parametrize(
    "asked",
    ["quantization=none", "quantization=int8", "quantization.bnb_4bit_use_double_quant=false"],
)
def test_it_must_be_quantized_as_it_was_asked_for(tmp_path: Path, asked: str) -> None:
    root = write_workspace(tmp_path, ["quantization=nf4", asked])
    quantize_elsewhere(root, **STORED["nf4"])
    with pytest.raises(CapasError, match="cannot be quantized again") as refusal:
        run_stage("quantize", quantize_model.main, root)
    told = "quantization=nf4, quantization.bnb_4bit_compute_dtype=float32, "
    assert told + "quantization.bnb_4bit_use_double_quant=true" in str(refusal.value)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("gptq", "optimum and gptqmodel"),
        ("awq", "gptqmodel"),
        ("compressed-tensors", "the package compressed-tensors"),
        ("fp8", "no backward pass"),
        ("mxfp4", "no backward pass"),
        ("hqq", "does not support this method"),
    ],
)
def test_weights_of_another_kind_are_refused_in_words(
    tmp_path: Path, method: str, reason: str
) -> None:
    root = write_workspace(tmp_path, ["quantization=nf4"])
    file = root / "data/models/base/config.json"
    config = read_json(file) | {"quantization_config": {"quant_method": method, "bits": 4}}
    file.write_text(json.dumps(config))
    match = rf"quantization_config.quant_method={method}, and .*{reason}.*full-precision"
    with pytest.raises(CapasError, match=match):
        run_stage("quantize", quantize_model.main, root)


def test_older_files_name_no_method() -> None:
    config = {"quantization_config": {"load_in_8bit": True, "load_in_4bit": False}}
    assert stored_quantization(config, "x") == {"load_in_4bit": False, "load_in_8bit": True}
    with pytest.raises(CapasError, match="quant_method=unnamed"):
        stored_quantization({"quantization_config": {"bits": 4}}, "x")


def test_the_layers_of_gpt2_are_compared_the_right_way_round(tmp_path: Path) -> None:
    """Its Conv1D keeps [in, out]; its files call a layer h.0, its model transformer.h.0."""
    root = write_workspace(tmp_path, ["quantization=nf4"])
    sizes = {"vocab_size": 262, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(root / "data/models/base")
    run_stage("quantize", quantize_model.main, root)
    rows = list(csv.DictReader((root / "reports/quantization_error.csv").open()))
    assert [row["layer"].rpartition("h.0.")[2] for row in rows] == [
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    ]  # fmt: skip
    assert all(0.05 < float(row["relative_error"]) < 0.2 for row in rows)


def test_weights_are_found_by_their_ending_where_only_one_has_it(tmp_path: Path) -> None:
    weights = {"layers.0.q.weight": 0, "layers.1.q.weight": 1, "a.h.0.w.weight": 2}
    save = {name: torch.full((1,), float(value)) for name, value in weights.items()}
    save_file(save | {"b.h.0.w.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    asked = ["model.layers.1.q", "layers.0.q", "c.h.0.w", "model.layers.2.q"]
    found = {name: tensor.item() for name, tensor in read_weights(tmp_path, asked)}
    assert found == {"model.layers.1.q": 1.0, "layers.0.q": 0.0}
