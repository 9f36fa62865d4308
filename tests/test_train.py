"""Training on a tiny random model: what is trained, what is not, and that the same inputs give the same bytes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import read_json, run_stage, write_workspace

from stages import train_lora

ADAPTER = "data/models/adapter/adapter_model.safetensors"


def train(root: Path, *overrides: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    run_stage("train", train_lora.main, write_workspace(root, overrides))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"))


def test_base_is_untouched_and_b_is_not_zero(trained: Path) -> None:
    weights = load_file(trained / ADAPTER)
    assert weights and all(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)
