"""The whole pipeline in a throw-away clone: what a user sees.

With `experiment: quick` by default; in the slow tier with the shipped configuration, too.
"""

import json
from pathlib import Path

import pytest
import yaml
from workspace import Workspace, make_workspace, stages_run

from capas.cores import MAX_THREADS

AFTER_TRAIN = {"train", "evaluate", "sample", "report", "publish"}


# The order of sets, the language and the clock of another machine.
ELSEWHERE = {"PYTHONHASHSEED": "7", "LANG": "C", "TZ": "Asia/Tokyo"}


@pytest.fixture(scope="module", params=["quick", pytest.param("none", marks=pytest.mark.slow)])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("pipeline"))
    workspace.edit("conf/config.yaml", "experiment: none", f"experiment: {request.param}")
    workspace.repro()
    workspace.commit()
    return workspace


@pytest.fixture
def workspace(finished: Workspace) -> Workspace:
    finished.run("git", "checkout", "-q", ".")
    finished.run("dvc", "checkout", "-q")
    finished.repro()
    return finished


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


def test_a_comment_reruns_compose_alone(workspace: Workspace) -> None:
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 16 # a comment")
    assert stages_run(workspace.repro()) == ["compose"]


def test_one_value_reruns_what_it_touches(workspace: Workspace) -> None:
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 4")
    assert set(stages_run(workspace.repro())) == {"compose", *AFTER_TRAIN}
    assert '"r": 4' in workspace.read("data/models/adapter/adapter_config.json")


@pytest.mark.parametrize("when", ["between steps", "while saving"])
def test_a_killed_training_ends_in_the_same_bytes(workspace: Workspace, when: str) -> None:
    expected = workspace.outputs()
    forget(workspace, "train")
    folder = workspace.root / ".dvc/tmp/checkpoints"
    second = 2 * yaml.safe_load(workspace.read("params.yaml"))["trainer"]["save_steps"]
    pattern = f"train-*/checkpoint-{second}" + ("/complete.json" if when == "between steps" else "")
    workspace.repro_killed("train", lambda: any(folder.glob(pattern)))
    assert not (workspace.root / "data/models/adapter").exists()
    assert "train: going on from checkpoint-" in workspace.repro()
    assert workspace.outputs() == expected


@pytest.mark.parametrize(
    ("stage", "path"), [("format", "data/formatted"), ("quantize", "data/models/quantized")]
)
def test_a_killed_stage_ends_in_the_same_bytes(workspace: Workspace, stage: str, path: str) -> None:
    expected = workspace.outputs()
    forget(workspace, stage)
    workspace.repro_killed(stage, partial(workspace, path).exists)
    assert not (workspace.root / path).exists()
    workspace.repro()
    assert workspace.outputs() == expected


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
print([(run.info.status, "tuned/loss" in run.data.metrics) for run in runs])
"""


def test_exp_run_apply_and_a_later_edit(workspace: Workspace) -> None:
    log = workspace.run("dvc", "exp", "run", "-n", "slower", "-S", "trainer.learning_rate=1e-3")
    assert set(stages_run(log)) > AFTER_TRAIN
    workspace.run("git", "checkout", "-q", ".")
    workspace.run("dvc", "exp", "apply", "slower")
    assert set(stages_run(workspace.repro())) <= {"publish"}
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 4")
    workspace.repro("compose")
    assert "learning_rate: 0.001\n" in workspace.read("params.yaml")


def test_the_result_is_asked_and_merged(workspace: Workspace, tmp_path: Path) -> None:
    """That of the workspace, and the same one as MLflow holds it."""
    key = json.loads(workspace.read("reports/train.json"))["train_key"]
    weights = []
    for source in ([], ["--run", key]):
        folder = tmp_path / f"merged{len(source)}"
        said = workspace.run("python", "-m", "capas", "merge", str(folder), *source)
        assert "(tolerance for float32: 0.001; the adapter changes" in said
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    asked = f"printf 'set a timer for 99 minutes\\n/base\\n' | python -m capas chat --run {key}"
    assert len(workspace.run("bash", "-c", asked).splitlines()) >= 2
    assert workspace.run("git", "status", "--porcelain") == ""


def test_forced_again_every_stage_writes_the_same_bytes(workspace: Workspace) -> None:
    before = workspace.read("dvc.lock")
    workspace.repro("--force", **ELSEWHERE)
    assert workspace.read("dvc.lock") == before


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
    workspace.edit("conf/hardware/cpu.yaml", "num_threads: 2", f"num_threads: {num_threads}")
    workspace.repro(**{MAX_THREADS: "4"})
    shown = {"params.yaml", "reports/index.html", "reports/index.es.html"}
    shown |= {"reports/train.json", "reports/certificate.json"}
    found = workspace.outputs()
    assert {p for p in found if found[p] != expected[p]} - {"reports/.published"} <= shown
    after = json.loads(workspace.read("reports/train.json"))
    assert {**after, "train_key": None} == {**before, "train_key": None}
