"""Benchmarks that compare capas with others: a few steps of them, so that they still run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "data/formatted").is_dir(), reason="data/formatted is missing: run `dvc repro`"
)
def test_all_ways_generate_the_same_texts() -> None:
    command = [sys.executable, "benchmarks/generate.py", "--prompts", "6", "--batch-size", "3"]
    done = subprocess.run(
        [*command, "--turns", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ways = json.loads(done.stdout)["ways"]
    assert len(ways) == 7
    for facts in ways.values():
        assert facts["num_texts_unlike_alone"] == 0 and facts["cpu_seconds"] > 0


@pytest.mark.slow
def test_answers_on_the_gpu_run_dry() -> None:
    """benchmarks/generate_gpu.py on a CPU: the three ways write answers of the same length."""
    small = ("--shape", "tiny", "--prompts", "6", "--batch-size", "3", "--limit", "16")
    found = {}
    for way in ("plain", "capas", "continuous"):
        command = [sys.executable, "benchmarks/generate_gpu.py", way, "--device", "cpu", *small]
        done = subprocess.run(
            [*command, "--blocks", "64"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[way] = json.loads(done.stdout)["answer_tokens"]
    assert len({*found.values()}) == 1 and 6 <= found["capas"] < 6 * 16


@pytest.mark.slow
def test_the_ladder_of_the_gpu_runs_dry() -> None:
    """benchmarks/train_gpu.py on a CPU: its own rows, and a reason for what is not installed here."""
    ways = ["capas, as PEFT prepares it", "capas", "capas, liger kernels"]
    command = ["benchmarks/train_gpu.py", "--device", "cpu", "--shape", "tiny", "--steps", "4"]
    done = subprocess.run(
        [sys.executable, *command, "--ways", *ways],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, shipped, liger = json.loads(done.stdout)["ways"]
    assert shipped["losses"] == pytest.approx(before["losses"], rel=1e-3)
    assert len(shipped["losses"]) == 4 and shipped["tokens_per_second"] > 0
    assert "liger" in liger["error"]
