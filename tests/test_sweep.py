"""Sweeps: isolation, one run of what is shared, kills, failures, ranking; on a pipeline of fakes."""

import re
import signal
from pathlib import Path

import psutil
import pytest
from sweeping import Sweeper, kill

from capas import links
from capas.errors import CapasError
from capas.locks import exclusive
from capas.sweep.plan import Plan
from capas.worktree import git

TWO_AT_ONCE = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
RATES = "trainer.learning_rate=0.01,0.1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sweeper:
    return Sweeper.make(tmp_path_factory.mktemp("sweep") / "with a blank")


@pytest.fixture
def sweeper(made: Sweeper) -> Sweeper:
    """As committed, without experiments, sweeps and results of the test before."""
    for reference in made.experiments().values():
        made.run("git", "update-ref", "-d", reference)
    made.run("rm", "-rf", ".dvc/tmp/sweep", ".dvc/tmp/hold", ".dvc/cache/runs")
    made.run("git", "checkout", "-q", ".")
    made.run("git", "clean", "-qfd")
    made.run("rm", "-f", "data/own/mine.csv")  # git ignores it
    made.run("dvc", "checkout", "-q", "--force")
    made.forget()
    return made


def test_what_points_share_runs_once_and_the_same_sweep_again_runs_nothing(
    sweeper: Sweeper,
) -> None:
    said = sweeper.sweep("-m", RATES, "quantization=fp4,int8", "dataset.seed=7", *TWO_AT_ONCE)
    ran = sweeper.ran()
    assert [ran[stage] for stage in ("fetch", "quantize", "train", "evaluate")] == [1, 2, 4, 4]
    assert len(sweeper.experiments()) == 4
    best = re.findall(r"dvc exp apply (\S+)", said)[0]
    assert best.startswith("learning_rate=0.01-quantization=") and best in sweeper.experiments()
    sweeper.forget()
    again = sweeper.sweep("-m", RATES, "quantization=fp4,int8", "dataset.seed=7", *TWO_AT_ONCE)
    assert sweeper.ran() == {}
    assert again.count("(had it)") == 4
    assert sweeper.run("git", "status", "--porcelain") == ""


def test_points_have_what_is_not_committed_and_the_workspace_stays(sweeper: Sweeper) -> None:
    (sweeper.root / "note.txt").write_text("not committed\n")
    (sweeper.root / "new.txt").write_text("untracked\n")
    (sweeper.root / "data/own/mine.csv").write_text("a,b\n")
    sweeper.edit(
        "fake.py",
        'Path("note.txt").read_text()',
        'Path("note.txt").read_text() + Path("new.txt").read_text()',
    )
    sweeper.run("git", "add", "fake.py")
    before = sweeper.run("git", "status", "--porcelain")
    sweeper.sweep("-m", RATES)
    (name,) = [name for name in sweeper.experiments() if "0.01-" in name]
    found = sweeper.result(name, "data/models/adapter")
    assert found["note"] == "not committed\nuntracked\n"
    assert "mine.csv" in found["own"]
    assert sweeper.run("git", "status", "--porcelain") == before
    sweeper.run("dvc", "exp", "apply", name)
    assert "learning_rate: 0.01\n" in sweeper.read("params.yaml")
    assert sweeper.read("note.txt") == "not committed\n"
    assert sweeper.read("new.txt") == "untracked\n"
    sweeper.forget()
    sweeper.repro()
    assert sweeper.ran() == {}


def test_an_edit_while_it_runs_reaches_no_point(sweeper: Sweeper) -> None:
    sweeper.hold("train")
    process = sweeper.sweep_beside("-m", RATES)
    sweeper.wait_for("train")
    (sweeper.root / "note.txt").write_text("later\n")
    sweeper.edit("conf/trainer/_base.yaml", "weight_decay: 0.0", "weight_decay: 0.5")
    sweeper.let_go()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    name = next(name for name in sweeper.experiments() if "0.1-" in name)
    assert sweeper.result(name, "data/models/adapter")["note"] == "committed\n"


def test_a_failed_point_is_told_others_go_on_and_only_it_is_retried(sweeper: Sweeper) -> None:
    said = sweeper.sweep("-m", "trainer.learning_rate=0.9,0.01", check=False)
    assert "failed  learning_rate=0.9-" in said and "the loss is nan" in said
    assert "1 of 2 points failed" in said and "dvc exp apply learning_rate=0.01-" in said
    assert "Traceback" not in said
    assert sweeper.ran()["train"] == 2
    sweeper.forget()
    process = sweeper.sweep_beside("-m", "trainer.learning_rate=0.9,0.01")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert sweeper.ran() == {"train 0.9": 1, "train": 1}


@pytest.mark.parametrize("launcher", [(), TWO_AT_ONCE])
def test_a_killed_sweep_goes_on(sweeper: Sweeper, launcher: tuple[str, ...]) -> None:
    words = ("-m", "trainer.learning_rate=0.01,0.1,0.001", "dataset.seed=3", *launcher)
    process = sweeper.sweep_beside(*words)
    sweeper.wait_for("evaluate", 1)
    sweeper.hold("train")
    sweeper.wait_for("train", 2 if not launcher else 3)
    kill(process)
    sweeper.wait_until_idle()
    sweeper.let_go()
    finished = len(sweeper.experiments())
    assert finished >= 1
    sweeper.forget()
    said = sweeper.sweep(*words)
    assert said.count("(had it)") >= finished
    assert len(sweeper.experiments()) == 3
    assert sweeper.ran()["fetch"] == 0
    assert sweeper.ran()["train"] == 3 - finished


def test_a_killed_worker_is_started_again(sweeper: Sweeper) -> None:
    sweeper.hold("train")
    process = sweeper.sweep_beside("-m", RATES, *TWO_AT_ONCE)
    sweeper.wait_for("train", 2)
    workers = [child for child in psutil.Process(process.pid).children() if child.children()]
    victim = next(child for child in workers if "loky" in " ".join(child.cmdline()))
    victim.kill()
    sweeper.let_go()
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    assert "its process was killed; it is started again" in said
    assert len(sweeper.experiments()) == 2


def test_two_sweeps_at_once_share_what_they_have_in_common(sweeper: Sweeper) -> None:
    one = sweeper.sweep_beside("-m", "trainer.learning_rate=0.01,0.1", "dataset.seed=5")
    two = sweeper.sweep_beside("-m", "trainer.learning_rate=0.1,0.001", "dataset.seed=5")
    for process in (one, two):
        said = process.communicate(timeout=180)[0]
        assert process.returncode == 0, said
    assert len(sweeper.experiments()) == 3
    assert (sweeper.ran()["fetch"], sweeper.ran()["train"]) == (1, 3)


def test_the_same_sweep_twice_at_once_is_refused(sweeper: Sweeper) -> None:
    sweeper.hold("train")
    process = sweeper.sweep_beside("-m", RATES)
    sweeper.wait_for("train")
    assert "this sweep is running already" in sweeper.sweep("-m", RATES, check=False)
    assert "the same command goes on with what is left" in kill(process, signal.SIGINT)
    assert process.returncode == 130


def test_seeds_are_replicates(sweeper: Sweeper) -> None:
    said = sweeper.sweep("-m", "trainer.learning_rate=0.01,0.1", "seed=1,2", *TWO_AT_ONCE)
    assert re.search(r"^ *1 +0\.015 ± 0\.06\d+ +2 ", said, re.MULTILINE)
    assert "dvc exp apply learning_rate=0.01-seed=1-" in said


def test_optuna_searches_and_proposes_the_same_points_again(sweeper: Sweeper) -> None:
    words = ("-m", "sweep=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1",
             "trainer.learning_rate=tag(log,interval(1e-3,1e-1))")  # fmt: skip
    assert "3/3" in sweeper.sweep(*words)
    sweeper.forget()
    assert sweeper.sweep(*words).count("(had it)") == 3
    assert sweeper.ran() == {}


def test_submitit_runs_the_points_as_jobs(sweeper: Sweeper) -> None:
    said = sweeper.sweep("-m", RATES, "hydra/launcher=submitit_local")
    assert "2/2" in said and len(sweeper.experiments()) == 2


@pytest.mark.parametrize("edited", [False, True])
def test_an_input_that_was_not_copied_whole_reaches_no_point(
    sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch, edited: bool
) -> None:
    mine = sweeper.root / "data/own/mine.csv"
    mine.write_text("a,b\n")
    plan = Plan.make(sweeper.root, ["lora.r=8"])

    def stopped(source: Path, target: Path) -> None:
        target.write_text("a")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(links, "place", stopped)
        plan.write()
    if edited:
        mine.write_text("c,d\n")
        with pytest.raises(
            CapasError, match=r"edited while the sweep copied it: data/own/mine.csv"
        ):
            plan.write()
        mine.write_text("a,b\n")
    plan.write()
    assert plan.copy_of("data/own/mine.csv").read_text() == "a,b\n"


def test_a_sweep_is_the_same_while_what_decides_its_points_is(sweeper: Sweeper) -> None:
    key = Plan.make(sweeper.root, RATES.split()).key
    (sweeper.root / "README.md").write_text("other words\n")
    (sweeper.root / "sweep.log").write_text("of tee\n")
    assert Plan.make(sweeper.root, RATES.split()).key == key
    (sweeper.root / ".git/info/exclude").write_text("private.yaml\n")
    (sweeper.root / "conf/dataset/private.yaml").write_text("defaults: [_base]\n")
    private = Plan.make(sweeper.root, RATES.split()).key
    (sweeper.root / "conf/dataset/private.yaml").write_text("defaults: [embedded]\n")
    assert len({key, private, Plan.make(sweeper.root, RATES.split()).key}) == 3
    (sweeper.root / "conf/dataset/private.yaml").unlink()
    (sweeper.root / ".git/info/exclude").unlink()


def test_a_folder_of_a_larger_repository_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub/.dvc").mkdir(parents=True)
    (tmp_path / "sub/dvc.yaml").touch()
    git(tmp_path, "init", "-q")
    with pytest.raises(CapasError, match=r"sub is the folder sub/ of a larger git repository"):
        Plan.make(tmp_path / "sub", [])


def test_an_error_that_nobody_thought_of_is_told_as_what_it_is(sweeper: Sweeper) -> None:
    sweeper.sweep("-m", "trainer.learning_rate=0.9", check=False)
    (log,) = (sweeper.root / ".dvc/tmp/sweep/plans").glob("*/logs/learning_rate*.log")
    log.unlink()
    log.mkdir()
    said = sweeper.sweep("-m", "trainer.learning_rate=0.9", check=False)
    assert "IsADirectoryError" in said and "was killed" not in said
    assert said.count("failed  learning_rate=0.9-") == 1


@pytest.mark.parametrize("words", [(), ("-m", "sweep.keep=true")])
def test_a_point_without_overrides_is_one(sweeper: Sweeper, words: tuple[str, ...]) -> None:
    assert re.search(r"1/1  point-\w+ ", sweeper.sweep(*words))
    assert "(had it)" in sweeper.sweep(*words)


def test_one_point_without_multirun(sweeper: Sweeper) -> None:
    assert "1/1  learning_rate=0.01-" in sweeper.sweep("trainer.learning_rate=0.01")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("-m", "trainer.learning_rat=1,2"), "Key 'learning_rat' is not in struct"),
        (("-m", "lora.r=0,8"), "lora.r=0: "),
        (("-m", "sweep.objective=train.loss", "lora.r=8"), "reports/metrics/train.json has validation_loss"),
        (("-m", "sweep.objective=tuned.loss", "lora.r=8"), "sweep.objective=tuned.loss is None"),
        (("-m", "dataset=nothing,embedded"), "Could not find 'dataset/nothing'"),
    ],
)  # fmt: skip
def test_wrong_words_are_told_without_a_traceback(
    sweeper: Sweeper, words: tuple[str, ...], expected: str
) -> None:
    process = sweeper.sweep_beside(*words)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert expected in said and "Traceback" not in said


def test_list_and_clean(sweeper: Sweeper) -> None:
    sweeper.sweep("-m", "trainer.learning_rate=0.9,0.01", check=False)
    work = sweeper.root / ".dvc/tmp/sweep/work"
    assert [path.name[:18] for path in work.iterdir()] == ["learning_rate=0.9-"]
    listed = sweeper.sweep("--list")
    assert "1 done, 1 failed" in listed and "experiments of DVC: 1" in listed
    assert "MB freed; the experiments are still there" in sweeper.sweep("--clean")
    assert not work.exists()
    assert len(sweeper.experiments()) == 1


def test_a_plan_that_cannot_be_read_is_told_and_cleaned_away(sweeper: Sweeper) -> None:
    sweeper.sweep("-m", RATES)
    (plan,) = (sweeper.root / ".dvc/tmp/sweep/plans").glob("*/plan.json")
    plan.write_text("")
    assert "plan.json cannot be read; --clean removes it" in sweeper.sweep("--list")
    sweeper.sweep("--clean")
    assert not (sweeper.root / ".dvc/tmp/sweep/plans").exists()


def test_a_point_that_runs_without_its_sweep_is_not_cleaned_away(sweeper: Sweeper) -> None:
    sweeper.sweep("-m", "trainer.learning_rate=0.9", check=False)
    (state,) = (sweeper.root / ".dvc/tmp/sweep/plans").glob("*/points/*.json")
    with exclusive(sweeper.root / f".dvc/tmp/sweep/locks/point-{state.stem}"):
        assert "1 sweeps are running" in sweeper.sweep("--clean")
        assert any((sweeper.root / ".dvc/tmp/sweep/work").iterdir())
    sweeper.sweep("--clean")
    assert not (sweeper.root / ".dvc/tmp/sweep/work").exists()


@pytest.mark.parametrize("script", ["stages/train_lora.py", "stages/compose_params.py"])
def test_a_stage_that_is_asked_to_sweep_names_the_way(sweeper: Sweeper, script: str) -> None:
    said = sweeper.run("python", script, "-m", "lora.r=4,8", check=False)
    assert "python stages/sweep.py -m lora.r=4,8" in said
