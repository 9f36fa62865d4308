"""Quantization for real: what is kept, what is lost, what comes back from disk."""

import csv
from pathlib import Path

import pytest
import torch
from tiny import read_json, run_stage, write_workspace

from capas.model import load_model, quantization_method
from capas.params import Params
from stages import quantize_model

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
