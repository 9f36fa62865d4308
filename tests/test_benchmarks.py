"""Benchmarks that compare capas with others: a few steps of them, so that they still run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(
    not (ROOT / "data/formatted").is_dir(), reason="data/formatted is missing: run `dvc repro`"
)
def test_all_that_train_the_same_have_the_same_losses(tmp_path: Path) -> None:
    """capas and transformers.Trainer; TRL and LLaMA-Factory need a package registry."""
    file = tmp_path / "train.json"
    command = [sys.executable, "benchmarks/train.py", "--contestants", "a,c", "--steps", "3"]
    subprocess.run([*command, "--rounds", "1", "--result", str(file)], cwd=ROOT, check=True)
    result = json.loads(file.read_text())
    assert list(result["contestants"]) == ["a", "c"]
    for facts in result["contestants"].values():
        assert facts["curve_difference"] < 1e-4
        assert 0 < facts["ms_per_step"] < 1000 * facts["whole_seconds"]
    assert set(result["capas_to"]) == {"transformers.Trainer"}
