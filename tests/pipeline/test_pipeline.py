"""The whole pipeline in a throw-away clone: what a user sees.

With a smaller `experiment: quick` by default; in the slow tier with the shipped configuration, too.
"""

import io
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from published import publish, the_run
from report_inputs import write_inputs
from workspace import Workspace, make_workspace, stages_run

from capas import __main__ as cli
from capas.core.cores import MAX_THREADS
from stages import publish_run

AFTER_TRAIN = {"train", "evaluate", "sample", "report", "publish"}
MARKER = "reports/.published"
# The order of sets, the language and the clock of another machine.
ELSEWHERE = {"PYTHONHASHSEED": "7", "LANG": "C", "TZ": "Asia/Tokyo"}
# Stages that take a second or two, and train.
FORCED = ("fetch", "tokenize", "format", "train", "report")
SMALLER = {
    "conf/experiment/quick.yaml": {
        "dataset: {max_records: 500}": "dataset: {max_records: 220}",
        "evaluation: {max_records: 40, max_new_tokens: 48}": (
            "evaluation: {max_records: 10, max_new_tokens: 16}"
        ),
        "generation: {num_prompts: 2, num_return_sequences: 2, max_new_tokens: 48}": (
            "generation: {num_prompts: 1, num_return_sequences: 2, max_new_tokens: 8}"
        ),
    },
    "conf/trainer/quick.yaml": {"max_steps: 20": "max_steps: 12", "save_steps: 5": "save_steps: 3"},
}


class Finished(NamedTuple):
    """A clone after `dvc repro`, and what its second start says: the first was killed in train."""

    workspace: Workspace
    log: str
    published: str


@pytest.fixture(scope="module", params=["quick", pytest.param("none", marks=pytest.mark.slow)])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    workspace = make_workspace(tmp_path_factory.mktemp("pipeline"))
    workspace.edit("conf/config.yaml", "experiment: none", f"experiment: {request.param}")
    if request.param == "quick":
        for file, edits in SMALLER.items():
            for old, new in edits.items():
                workspace.edit(file, old, new)
    kill_train(workspace, "complete.json")
    log = workspace.repro()
    workspace.commit()
    return Finished(workspace, log, workspace.read(MARKER))


@pytest.fixture
def workspace(finished: Finished) -> Workspace:
    """As it was committed; the marker is in neither git nor DVC's cache."""
    workspace = finished.workspace
    if workspace.run("git", "status", "--porcelain"):
        workspace.run("git", "checkout", "-q", ".")
        workspace.run("dvc", "checkout", "-q")
    (workspace.root / MARKER).write_text(finished.published)
    return workspace


def kill_train(workspace: Workspace, file: str) -> None:
    """As soon as `file` is in the second checkpoint."""
    folder = workspace.root / ".dvc/tmp/checkpoints"
    found = f"train-*/checkpoint-*/{file}"
    workspace.repro_killed("train", lambda: len(list(folder.glob(found))) > 1)
    assert not (workspace.root / "data/models/adapter").exists()


def partial(workspace: Workspace, path: str) -> Path:
    final = workspace.root / path
    return final.with_name(f".{final.name}.partial")


def forget(workspace: Workspace, stage: str) -> None:
    """Drop a stage's outputs, from DVC's cache too: it has to compute them again."""
    for out in workspace.recorded(stage)["outs"]:
        md5 = out["md5"]
        (workspace.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink(missing_ok=True)
        workspace.run("rm", "-rf", out["path"])
    workspace.run("rm", "-rf", ".dvc/cache/runs", ".dvc/tmp/checkpoints")


def test_a_second_run_runs_nothing_and_git_sees_no_change(workspace: Workspace) -> None:
    assert stages_run(workspace.repro()) == []
    assert workspace.run("git", "status", "--porcelain") == ""


def test_a_killed_training_goes_on_to_the_bytes_of_one_that_was_not(
    finished: Finished, workspace: Workspace
) -> None:
    """And the stages before and after it write the same bytes elsewhere."""
    assert "train: resuming from checkpoint-" in finished.log
    before = workspace.read("dvc.lock")
    log = workspace.repro("--force", "--single-item", *FORCED, **ELSEWHERE)
    assert set(stages_run(log)) == set(FORCED)
    assert "resuming from checkpoint-" not in log
    assert workspace.read("dvc.lock") == before


def test_a_comment_reruns_compose_alone(workspace: Workspace) -> None:
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 16 # a comment")
    workspace.edit("capas/training/trainer.py", '"""', '"""In other words: ')
    workspace.edit("stages/train_lora.py", "def main(", "# a comment\ndef main(")
    (workspace.root / "capas/notes.py").write_text("nobody_imports_it = 1\n")
    assert stages_run(workspace.repro()) == ["compose"]
    (workspace.root / "capas/notes.py").unlink()


def test_an_edit_of_the_trainer_makes_train_due_and_nothing_before_it(workspace: Workspace) -> None:
    workspace.edit(
        "capas/training/trainer.py", "\n\n\nclass Trainer(", "\n\n\nadded = 1\n\n\nclass Trainer("
    )
    said = workspace.run(sys.executable, "-m", "capas.workspace.due")
    assert "  train            capas/training/trainer.py\n" in said
    assert set(re.findall(r"^  (\w+) ", said, re.MULTILINE)) == {
        *("compose", "train", "evaluate", "sample", "report", "publish"),
    }
    log = workspace.repro("--force", "--single-item", "train", check=False)
    assert "train: the code of the stage 'train' was edited after compose wrote code.yaml" in log
    assert stages_run(workspace.repro("compose")) == ["compose"]
    status = workspace.run("dvc", "status", "--json").splitlines()[-1]
    changed = {stage for stage, why in json.loads(status).items() if "code.yaml" in str(why)}
    assert changed == {"train"}


def test_one_value_reruns_what_it_touches(workspace: Workspace) -> None:
    """By `dvc exp run -S`; then, once it is applied, another one by an edit."""
    before = workspace.read("reports/samples.jsonl")
    log = workspace.run("dvc", "exp", "run", "-n", "other", "-S", "generation.seed=1")
    assert set(stages_run(log)) == {"compose", "sample", "report", "publish"}
    workspace.run("git", "checkout", "-q", ".")
    workspace.run("dvc", "exp", "apply", "other")
    assert workspace.read("reports/samples.jsonl") != before
    assert set(stages_run(workspace.repro())) <= {"publish"}
    workspace.edit("conf/model/embedded.yaml", "licence: apache-2.0", "licence: mit")
    assert stages_run(workspace.repro("report")) == ["compose", "report"]
    values = yaml.safe_load(workspace.read("params.yaml"))
    assert (values["generation"]["seed"], values["model"]["licence"]) == (1, "mit")


@pytest.mark.slow
def test_one_value_of_the_training_reruns_it(workspace: Workspace) -> None:
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 4")
    assert set(stages_run(workspace.repro())) == {"compose", *AFTER_TRAIN}
    assert '"r": 4' in workspace.read("data/models/adapter/adapter_config.json")


@pytest.mark.slow
def test_exp_run_trains_with_its_value(workspace: Workspace) -> None:
    log = workspace.run("dvc", "exp", "run", "-n", "slower", "-S", "trainer.learning_rate=1e-3")
    assert set(stages_run(log)) > AFTER_TRAIN
    workspace.run("git", "checkout", "-q", ".")
    workspace.run("dvc", "exp", "apply", "slower")
    assert set(stages_run(workspace.repro())) <= {"publish"}
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 4")
    workspace.repro("compose")
    assert "learning_rate: 0.001\n" in workspace.read("params.yaml")


@pytest.mark.slow
def test_forced_again_every_stage_writes_the_same_bytes(workspace: Workspace) -> None:
    before = workspace.read("dvc.lock")
    workspace.repro("--force", **ELSEWHERE)
    assert workspace.read("dvc.lock") == before


@pytest.mark.slow
@pytest.mark.parametrize("file", ["complete.json", "adapter_model.safetensors"])
def test_a_training_that_is_killed_again_ends_in_the_same_bytes(
    workspace: Workspace, file: str
) -> None:
    """Between two steps, and while a checkpoint is written."""
    expected = workspace.outputs()
    forget(workspace, "train")
    kill_train(workspace, file)
    assert "train: resuming from checkpoint-" in workspace.repro()
    assert workspace.outputs() == expected


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        ("format", "data/formatted"),
        pytest.param("quantize", "data/models/quantized", marks=pytest.mark.slow),
    ],
)
def test_a_killed_stage_ends_in_the_same_bytes(workspace: Workspace, stage: str, path: str) -> None:
    expected = workspace.outputs()
    forget(workspace, stage)
    workspace.repro_killed(stage, partial(workspace, path).exists)
    assert not (workspace.root / path).exists()
    workspace.repro()
    assert workspace.outputs() == expected


@pytest.mark.slow
def test_a_killed_publish_leaves_one_finished_run(workspace: Workspace) -> None:
    expected = workspace.outputs()
    (workspace.root / "mlflow.db").unlink()
    workspace.run("rm", "-rf", "mlartifacts")
    forget(workspace, "publish")
    workspace.repro_killed("publish", (workspace.root / "mlartifacts").exists)
    workspace.repro()
    assert workspace.outputs() == expected
    runs = workspace.run("python", "-c", _RUNS).splitlines()[-1]
    assert runs == "[('FINISHED', True)]"


_RUNS = """
import mlflow
mlflow.set_tracking_uri("sqlite:///mlflow.db")
runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
print([(run.info.status, "tuned.loss" in run.data.metrics) for run in runs])
"""


def test_a_publish_that_is_killed_is_completed_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fork of this process, before it sends the files."""
    root = write_inputs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            publish_run, "send_artifacts", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        )
        process = multiprocessing.get_context("fork").Process(target=publish, args=(root,))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert the_run(root)[1].status == "FAILED"
    publish(root)
    assert the_run(root)[1].status == "FINISHED"
    assert "tuned.loss" in the_run(root)[1].metrics


@pytest.fixture
def here(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process in the workspace."""
    for name in [n for n in os.environ if n.startswith(("DVC_", "GIT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(workspace.root)
    return monkeypatch


def test_the_result_is_asked_and_merged(
    workspace: Workspace, here: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """That of the workspace, and the same one as MLflow holds it."""
    key = json.loads(workspace.read("reports/train.json"))["train_key"]
    weights = []
    for source in ([], ["--run", key]):
        folder = tmp_path / f"merged{len(source)}"
        assert cli.main(["merge", str(folder), *source]) == 0
        said = capsys.readouterr()
        assert "(tolerance for float32: 0.001; the adapter changes" in said.out + said.err
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    here.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"set a timer for 99 minutes\n/base\n")))
    assert cli.main(["chat", "--run", key]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert workspace.run("git", "status", "--porcelain") == ""


@pytest.mark.slow
def test_another_clone_records_the_same_lock(workspace: Workspace, tmp_path: Path) -> None:
    workspace.run("git", "clone", "-q", ".", str(tmp_path / "clone"))
    clone = Workspace(tmp_path / "clone")
    clone.repro(**ELSEWHERE)
    assert clone.read("dvc.lock") == workspace.read("dvc.lock")
    assert clone.run("git", "status", "--porcelain") == ""


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_do_not_change_a_byte(workspace: Workspace, num_threads: int) -> None:
    expected, before = workspace.outputs(), json.loads(workspace.read("reports/train.json"))
    old, new = "cpu_num_threads: 2", f"cpu_num_threads: {num_threads}"
    workspace.edit("conf/model/embedded.yaml", old, new)
    workspace.repro(**{MAX_THREADS: "4"})
    shown = {"params.yaml", "reports/index.html", "reports/index.es.html"}
    shown |= {"reports/train.json", "reports/certificate.json"}
    found = workspace.outputs()
    assert {p for p in found if found[p] != expected[p]} - {"reports/.published"} <= shown
    after = json.loads(workspace.read("reports/train.json"))
    assert {**after, "train_key": None} == {**before, "train_key": None}
