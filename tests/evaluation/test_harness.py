"""Tasks of the lm-evaluation-harness: evaluated as it does itself, told in reports, page and MLflow run."""

import contextlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from report_inputs import build_words, write_inputs
from shipped import composed
from tiny import read_json, read_params, run_stage, write_workspace

from capas.config.validation import validate
from capas.core.dag import StageSpec
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.stage import Stage
from capas.evaluation import harness
from capas.models.loading import attach_adapter, load_model
from capas.tracking import run_content
from stages import evaluate_model, train_lora

FOLDER = "data/own/tasks"
TASK = """
task: numbers
dataset_path: json
dataset_kwargs:
  data_files: {test: numbers.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "timer {{minutes}}"
doc_to_choice: ['{"minutes": {{minutes}}}', '{"minutes": {{minutes + 1}}}']
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: brier_score
metadata: {version: 3}
"""
SCORES = {"base": 0.25, "base_stderr": 0.1, "tuned": 0.75, "tuned_stderr": None}
FOUND = {
    "version": "0.4.13",
    "tasks": {
        "numbers": {"version": 3, "num_records": 12, "num_fewshot": 0, "metrics": {"acc": SCORES}}
    },
}


def write_task(root: Path) -> Path:
    folder = root / FOLDER
    folder.mkdir(parents=True)
    (folder / "numbers.yaml").write_text(TASK)
    rows = ({"minutes": 7 * i, "label": i % 2} for i in range(12))
    (folder / "numbers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_scores_are_those_that_the_harness_gives_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_tasks = pytest.importorskip("lm_eval.tasks", reason="pip install -e '.[harness]'")
    own_alone = partial(lm_tasks.TaskManager, include_defaults=False)  # the others: seconds to list
    monkeypatch.setattr(lm_tasks, "TaskManager", own_alone)
    chosen = [f"evaluation.harness.{key}" for key in ("tasks=[numbers]", "num_fewshot=2")]
    root = write_workspace(tmp_path, chosen)
    folder = write_task(root)
    handed_on = root / "data/composed/harness.json"
    handed_on.write_text(json.dumps(harness.read_tasks(["numbers"], FOLDER, root)))
    run_stage("train", train_lora.main, root)
    run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
    run_stage("evaluate", partial(evaluate_model.main, "tuned"), root)
    found = read_json(root / "reports/evaluation.json")["harness"]
    facts = found["tasks"]["numbers"]
    assert (facts["version"], facts["num_records"], facts["num_fewshot"]) == (3, 12, 2)
    expected = {name: directly(root, folder, name == "tuned") for name in ("base", "tuned")}
    for metric in ("acc", "acc_norm"):
        for name, scores in expected.items():
            assert facts["metrics"][metric][name] == pytest.approx(scores[f"{metric},none"])
            stderr = facts["metrics"][metric][f"{name}_stderr"]
            assert stderr == pytest.approx(scores[f"{metric}_stderr,none"], rel=1e-5)
    brier = {name: scores["brier_score,none"] for name, scores in expected.items()}
    assert brier["base"] != brier["tuned"]
    for name, score in brier.items():
        assert facts["metrics"]["brier_score"][name] == pytest.approx(score, rel=1e-5)


def directly(root: Path, folder: Path, adapted: bool) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    params = read_params("evaluate", root)
    model: Any = load_model(root / "data/models/quantized", params.model, torch.device("cpu"))
    if adapted:
        model = attach_adapter(model, root / "data/models/adapter")
    tokenizer = AutoTokenizer.from_pretrained(root / "data/models/tokenizer")
    with contextlib.chdir(folder):
        scores: dict[str, Any] = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=["numbers"],
            task_manager=TaskManager(include_path="."),
            num_fewshot=2,
            fewshot_random_seed=params.evaluation.seed,
        )["results"]["numbers"]
    return scores


def test_without_tasks_nothing_is_written(tmp_path: Path) -> None:
    assert harness.read_tasks([], None, tmp_path) == {"version": None, "files": {}}
    assert "harness" not in read_json(write_inputs(tmp_path) / "reports/evaluation.json")
    assert "lm-evaluation-harness" not in build_words(tmp_path)


def test_the_page_and_the_run_show_every_score(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    file = root / "reports/evaluation.json"
    file.write_text(json.dumps({**read_json(file), "harness": FOUND}))
    page = build_words(root)
    cells = re.sub(r"<td[^>]*>", "<td>", page)
    row = "<code>numbers</code> acc</th><td>0.250 ± 0.100</td><td>0.750</td><td>12</td>"
    assert row in cells and "lm-evaluation-harness 0.4.13" in page
    metrics = run_content.metrics(Stage(StageSpec.read("publish", root), root), {})
    sent = {name: value for name, value in metrics.items() if name.startswith("harness.")}
    prefix = "harness.numbers.acc"
    assert sent == {f"{prefix}.{name}": v for name, v in SCORES.items() if v is not None}


def test_it_is_refused_where_the_harness_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "no-such-package")
    with pytest.raises(CapasError, match=r"\['arc_easy'\] needs .* pip install -e '\.\[harness\]'"):
        harness.read_tasks(["arc_easy"], None, tmp_path)


@pytest.mark.parametrize(
    ("include_path", "message"),
    [
        ("/tmp/tasks", "move the tasks into a folder in conf or data/own"),
        ("data/own/../../elsewhere", "move the tasks into a folder"),
        ("data/own", "move the tasks into a folder"),
        ("data/own/nothing", "no such folder"),
        ("data/own/empty", "no task found; a task is a file NAME.yaml"),
        ("data/own/binary", "a file is not UTF-8 text"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, include_path: str, message: str
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "torch")  # something that is installed
    for name in ("empty", "binary"):
        (tmp_path / "data/own" / name).mkdir(parents=True)
    (tmp_path / "data/own/binary/task.yaml").write_bytes(b"task: \xff")
    with pytest.raises(CapasError, match=message):
        harness.read_tasks(["mine"], include_path, tmp_path)


def test_a_task_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install -e '.[harness]'")
    handed_on = tmp_path / "harness.json"
    names = ["arc_easy", "arc_eazy"]  # the first is one of the harness
    handed_on.write_text(json.dumps(harness.read_tasks(names, None, tmp_path)))
    settings = Params({"tasks": names, "num_fewshot": None, "limit": None})
    with pytest.raises(CapasError, match=r"the harness knows no task arc_eazy$"):
        harness.evaluate(None, None, settings, handed_on, 1, 0)


def test_a_folder_of_tasks_without_their_names_is_refused() -> None:
    values = composed([f"evaluation.harness.include_path={FOLDER}"])
    with pytest.raises(CapasError, match="the names of its tasks in"):
        validate(values)
