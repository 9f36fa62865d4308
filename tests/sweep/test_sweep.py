"""Sweeps: isolation, one run of what is shared, kills, failures, ranking; on a pipeline of fakes.

The fakes run in DVC where DVC's part is meant, below a stand-in (dvc_standin.py) in the other tests.
"""

import json
import os
import re
import shlex
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from sweeping import Sweeper

from capas.core import links
from capas.core.errors import CapasError
from capas.core.locks import exclusive
from capas.core.worktree import git
from capas.sweep.plan import Plan, check_home
from capas.sweep.state import RUNNING, State

TWO_AT_ONCE = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
RATES = "trainer.learning_rate=0.01,0.1"
FAILS = "trainer.learning_rate=0.9"
ONE_FAILS = ("-m", "trainer.learning_rate=0.01,0.9", "dataset.seed=7")
THREE = ("-m", "trainer.learning_rate=0.01,0.1,0.001", "dataset.seed=3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sweeper:
    return Sweeper.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def real(made: Sweeper, tmp_path: Path) -> Sweeper:
    """A repository of the test's own, with DVC."""
    return made.copy(tmp_path / "with a blank")


class Swept(NamedTuple):
    """A repository after the sweep ONE_FAILS; `status` is that of git, before and after."""

    sweeper: Sweeper
    code: int
    said: str
    ran: Counter[str]
    status: tuple[str, str]


@pytest.fixture(scope="module")
def swept(made: Sweeper, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Swept with DVC, from a workspace in which little is committed."""
    sweeper = made.copy(tmp_path_factory.mktemp("swept") / "with a blank")
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
    process = sweeper.sweep_beside(*ONE_FAILS, *TWO_AT_ONCE)
    said = process.communicate(timeout=300)[0]
    after = sweeper.run("git", "status", "--porcelain")
    return Swept(sweeper, process.returncode, said, sweeper.ran(), (before, after))


def test_what_points_share_runs_once(swept: Swept) -> None:
    ran = swept.ran
    assert [ran[stage] for stage in ("fetch", "quantize", "train", "evaluate")] == [1, 1, 2, 1]
    assert len(swept.sweeper.experiments()) == 1
    best = re.findall(r"dvc exp apply (\S+)", swept.said)[0]
    assert re.fullmatch(r"learning_rate=0.01-\w{10}", best)
    assert best in swept.sweeper.experiments()


def test_a_failed_point_is_told_and_the_others_go_on(swept: Swept) -> None:
    assert swept.code == 1
    assert re.search(r"failed  learning_rate=0.9-\w{10}$", swept.said, re.MULTILINE)
    assert "the loss is nan" in swept.said
    assert "1 of 2 trials failed" in swept.said
    assert "dvc exp apply learning_rate=0.01-" in swept.said
    assert "Traceback" not in swept.said


def test_a_sweep_ends_with_a_page_that_git_ignores(swept: Swept) -> None:
    assert "the page of this sweep: reports/sweep.html\n" in swept.said
    html = swept.sweeper.read("reports/sweep.html")
    assert re.findall(r"dvc exp apply \S+", swept.said)[0] in html
    assert "the loss is nan" in html and '<th class="digits">tuned.exact_match</th>' in html
    assert 'lang="es"' in swept.sweeper.read("reports/sweep.es.html")
    assert "sweep.html" not in swept.status[1]


def test_points_have_what_is_not_committed_and_the_workspace_stays(swept: Swept) -> None:
    (name,) = swept.sweeper.experiments()
    found = swept.sweeper.result(name, "data/models/adapter")
    assert found["note"] == "not committed\nuntracked\n"
    assert "mine.csv" in found["own"]
    before, after = swept.status
    assert "new.txt" in before and after == before


def test_the_same_sweep_again_retries_what_failed_and_a_point_can_be_adopted(swept: Swept) -> None:
    sweeper = swept.sweeper
    sweeper.forget()
    code, again = sweeper.sweep_here(*ONE_FAILS)
    assert code == 1
    assert again.count("(had it)") == 1
    assert sweeper.ran() == {"train 0.9": 1, "train": 1}
    (name,) = sweeper.experiments()
    sweeper.run("dvc", "exp", "apply", name)
    assert "learning_rate: 0.01\n" in sweeper.read("params.yaml")
    assert sweeper.read("note.txt") == "not committed\n"
    assert sweeper.read("new.txt") == "untracked\n"
    sweeper.forget()
    sweeper.repro()
    assert sweeper.ran() == {}


def test_two_sweeps_at_once_share_what_they_have_in_common(real: Sweeper) -> None:
    one = real.sweep_beside("-m", "quantization=fp4,int8", "dataset.seed=5")
    two = real.sweep_beside("-m", "quantization=int8,fp4", "dataset.seed=5")
    for process in (one, two):
        said = process.communicate(timeout=180)[0]
        assert process.returncode == 0, said
    assert len(real.experiments()) == 2
    ran = real.ran()
    assert [ran[stage] for stage in ("fetch", "quantize", "train")] == [1, 2, 2]


def interrupted(
    sweeper: Sweeper, number: int, words: tuple[str, ...], *launcher: str
) -> "subprocess.Popen[str]":
    """A sweep that a signal ends in the training of its last point."""
    process = sweeper.sweep_beside(*words, *launcher)
    sweeper.wait_for("evaluate", 1)
    sweeper.hold("train")
    sweeper.wait_for("train", 3 if launcher else 2)
    # Ctrl-C in a terminal, `timeout` and schedulers reach the whole group.
    send = os.kill if number == signal.SIGKILL else os.killpg
    send(process.pid, number)
    process.wait(120)
    sweeper.wait_until_idle()
    sweeper.let_go()
    return process


def check_it_goes_on(sweeper: Sweeper, words: tuple[str, ...], num_points: int) -> None:
    """The same sweep runs what is left, whatever the launcher."""
    finished = len(sweeper.experiments())
    assert finished >= 1
    sweeper.forget()
    code, said = sweeper.sweep_here(*words)
    assert code == 0
    assert said.count("(had it)") >= finished
    assert len(sweeper.experiments()) == num_points
    assert sweeper.ran()["fetch"] == 0
    assert sweeper.ran()["train"] == num_points - finished


@pytest.mark.parametrize(
    ("number", "launcher"), [(signal.SIGTERM, ()), (signal.SIGINT, TWO_AT_ONCE)]
)
def test_a_stopped_sweep_says_how_to_go_on_and_does(
    sweeper: Sweeper, number: int, launcher: tuple[str, ...]
) -> None:
    words = ("-m", RATES) if not launcher else THREE
    process = interrupted(sweeper, number, words, *launcher)
    said = process.communicate()[0]
    assert process.returncode == 130
    command = shlex.join(["stages/sweep.py", *words, *launcher])
    last = f"sweep: stopped; finished trials are kept. To continue: python {command}"
    assert said.splitlines()[-1] == last
    assert "Traceback" not in said and "KeyboardInterrupt" not in said
    check_it_goes_on(sweeper, words, 3 if launcher else 2)


def test_a_killed_sweep_goes_on(sweeper: Sweeper) -> None:
    interrupted(sweeper, signal.SIGKILL, THREE, *TWO_AT_ONCE)
    check_it_goes_on(sweeper, THREE, 3)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TWO_AT_ONCE])
def test_a_killed_sweep_of_dvc_goes_on(real: Sweeper, launcher: tuple[str, ...]) -> None:
    interrupted(real, signal.SIGKILL, THREE, *launcher)
    check_it_goes_on(real, THREE, 3)


@pytest.mark.slow
def test_points_share_what_they_have_in_common_and_nothing_else(real: Sweeper) -> None:
    words = ("-m", RATES, "quantization=fp4,int8", "dataset.seed=7", *TWO_AT_ONCE)
    real.sweep(*words)
    ran = real.ran()
    assert [ran[stage] for stage in ("fetch", "quantize", "train", "evaluate")] == [1, 2, 4, 4]
    real.forget()
    assert real.sweep(*words).count("(had it)") == 4
    assert real.ran() == {}
    assert real.run("git", "status", "--porcelain") == ""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TWO_AT_ONCE])
def test_points_of_own_options_which_git_does_not_have(
    real: Sweeper, launcher: tuple[str, ...]
) -> None:
    own = real.root / "conf/own/trainer/slow.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [qlora, _self_]\npreset: slow\nlearning_rate: 1.0e-5\n")
    said = real.sweep("-m", "trainer=slow,adamw", *launcher)
    (name,) = (name for name in real.experiments() if name.startswith("trainer=slow-"))
    assert real.result(name, "data/models/adapter")["rate"] == 1e-5
    assert real.ran()["train 1e-05"] == 1
    again = real.sweep("-m", "trainer=slow,adamw", *launcher)
    assert again.count("(had it)") == 2, said


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
    assert "its process was killed; starting it again" in said
    assert len(sweeper.experiments()) == 2


def test_an_edit_while_it_runs_reaches_no_point_and_the_same_sweep_is_refused(
    sweeper: Sweeper,
) -> None:
    sweeper.hold("train")
    process = sweeper.sweep_beside("-m", RATES)
    sweeper.wait_for("train")
    code, said = sweeper.sweep_here("-m", RATES)
    assert code == 1 and "this sweep is already running" in said
    (sweeper.root / "note.txt").write_text("later\n")
    sweeper.edit("conf/trainer/_base.yaml", "weight_decay: 0.0", "weight_decay: 0.5")
    sweeper.let_go()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    (point,) = [ref for name, ref in sweeper.experiments().items() if "0.1-" in name]
    adapter = sweeper.run("git", "show", f"{point}:data/models/adapter")
    assert json.loads(adapter)["note"] == "committed\n"
    assert "weight_decay: 0.0" in sweeper.run("git", "show", f"{point}:conf/trainer/_base.yaml")


def test_seeds_are_replicates(sweeper: Sweeper) -> None:
    _, said = sweeper.sweep_here("-m", "trainer.learning_rate=0.01", "seed=1,2")
    assert re.search(r"^ *1 +0\.015 ± 0\.06\d+ +2 ", said, re.MULTILINE)
    assert "dvc exp apply seed=1-" in said
    assert sweeper.run("git", "status", "--porcelain") == ""


def test_optuna_searches_and_proposes_the_same_points_again(sweeper: Sweeper) -> None:
    words = ("-m", "sweep=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1",
             "trainer.learning_rate=tag(log,interval(1e-3,1e-1))")  # fmt: skip
    assert "2/2" in sweeper.sweep_here(*words)[1]
    assert sweeper.ran()["train"] == 2
    sweeper.forget()
    assert sweeper.sweep_here(*words)[1].count("(had it)") == 2
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
            CapasError, match=r"edited while the sweep copied it, one of: data/own/mine.csv"
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


def test_a_folder_of_a_larger_repository_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub/.dvc").mkdir(parents=True)
    (tmp_path / "sub/dvc.yaml").touch()
    git(tmp_path, "init", "-q")
    with pytest.raises(CapasError, match=r"sub is the folder sub/ of a larger git repository"):
        check_home(tmp_path / "sub")


def test_an_error_that_nobody_thought_of_is_told_as_what_it_is(sweeper: Sweeper) -> None:
    (sweeper.root / ".dvc/tmp/sweep").mkdir()
    (sweeper.root / ".dvc/tmp/sweep/work").touch()  # a file where the points' folders would stand
    code, said = sweeper.sweep_here("-m", FAILS)
    assert code == 1
    assert "FileExistsError" in said and "was killed" not in said
    assert said.count("failed  learning_rate=0.9-") == 1


def test_a_point_without_overrides_is_one(sweeper: Sweeper) -> None:
    assert re.search(r"1/1  point-\w+ .* s\)$", sweeper.sweep_here()[1], re.MULTILINE)
    for words in ((), ("-m", "sweep.keep=true")):
        said = sweeper.sweep_here(*words)[1]
        assert re.search(r"1/1  point-\w+ .*\(had it\)$", said, re.MULTILINE)


def test_one_point_without_multirun(sweeper: Sweeper) -> None:
    code, said = sweeper.sweep_here("trainer.learning_rate=0.01")
    assert code == 0 and "1/1  learning_rate=0.01-" in said


def test_a_sweep_says_what_it_will_do_and_when_a_point_starts_and_ends(sweeper: Sweeper) -> None:
    said = sweeper.sweep_here("-m", RATES)[1]
    lines = [line for line in said.splitlines() if line.strip()]
    assert lines[0] == "sweep: 2 trials; 2 to run; duration unknown: no earlier run on this machine"
    for number, rate in enumerate(("0.01", "0.1"), 1):
        started = rf"started learning_rate={rate}-\w+  \({number}/2\)"
        assert re.fullmatch(started, lines[2 * number - 1])
        assert re.fullmatch(rf"{number}/2  learning_rate={rate}-.*\(\d+ s\)", lines[2 * number])
    said = sweeper.sweep_here("-m", f"{RATES},0.02", "hydra.launcher.x=1")[1]
    assert "hydra.launcher.x: the chosen launcher has no such setting" in said
    said = sweeper.sweep_here("-m", f"{RATES},0.02")[1]
    assert "3 trials, 2 already done; 1 to run, less than a minute (earlier trials)" in said
    assert said.count("(had it)") == 2 and said.count("started") == 1
    assert (
        "3 trials, 3 already done: nothing to run" in sweeper.sweep_here("-m", f"{RATES},0.02")[1]
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("-m", "trainer.learning_rat=1,2"), "did you mean trainer.learning_rate?"),
        (("-m", "lora.r=8,0"), "lora.r=0: input should be greater than 0"),
        (("-m", "dataset=nothing,embedded"), "dataset=nothing: no such option; dataset has alpaca"),
        (("-m", "lora=all_linear,none"), "cannot be (with lora=none)"),
        (
            ("-m", "lora.r=4,8", "sweep.objective=tuned.rougeL"),
            "will not contain the number rougeL",
        ),
        (("lora.r=4,8",), "python stages/sweep.py -m lora.r=4,8"),
    ],
)
def test_wrong_words_are_told_before_the_first_point_and_nothing_is_left(
    quick: Sweeper, words: tuple[str, ...], expected: str
) -> None:
    code, said = quick.sweep_here(*words)
    assert code == 1
    assert expected in said and "Traceback" not in said and "+" not in said
    assert quick.run("git", "status", "--porcelain") == "" and quick.experiments() == {}
    assert not (quick.root / "mlflow.db").exists()
    assert not (quick.root / ".dvc/tmp/sweep/plans").exists()


def test_an_objective_that_no_stage_computes_is_told_without_a_traceback(sweeper: Sweeper) -> None:
    code, said = sweeper.sweep_here("-m", "sweep.objective=tuned.loss", "lora.r=8")
    assert code == 1
    assert "sweep.objective=tuned.loss is None" in said and "Traceback" not in said
    assert sweeper.ran()["train"] == 1


def test_list_and_clean(sweeper: Sweeper) -> None:
    sweeper.sweep_here("-m", "trainer.learning_rate=0.9,0.01", "lora.target_modules=[q_proj]")
    work = sweeper.root / ".dvc/tmp/sweep/work"
    assert [path.name[:18] for path in work.iterdir()] == ["learning_rate=0.9-"]
    (failed,) = work.iterdir()
    (plan,) = (sweeper.root / ".dvc/tmp/sweep/plans").iterdir()
    State("dead", failed.name, []).write(plan / "points", status=RUNNING)
    listed = sweeper.sweep_here("--list")[1]
    assert "1 done, 1 failed, 1 stopped" in listed and "DVC experiments: 1" in listed
    assert "lora.target_modules=[q_proj]" in listed
    with exclusive(sweeper.root / f".dvc/tmp/sweep/locks/sweep-{plan.name}"):
        assert "1 running" in sweeper.sweep_here("--list")[1]
    assert "MB; the experiments are kept" in sweeper.sweep_here("--clean")[1]
    assert not work.exists()
    assert len(sweeper.experiments()) == 1


def test_a_plan_that_cannot_be_read_is_told_and_cleaned_away(sweeper: Sweeper) -> None:
    Plan.make(sweeper.root, RATES.split()).write()
    (plan,) = (sweeper.root / ".dvc/tmp/sweep/plans").glob("*/plan.json")
    plan.write_text("")
    assert "plan.json cannot be read; --clean removes it" in sweeper.sweep_here("--list")[1]
    sweeper.sweep_here("--clean")
    assert not (sweeper.root / ".dvc/tmp/sweep/plans").exists()


def test_a_point_that_runs_without_its_sweep_is_not_cleaned_away(sweeper: Sweeper) -> None:
    sweeper.sweep_here("-m", FAILS)
    (state,) = (sweeper.root / ".dvc/tmp/sweep/plans").glob("*/points/*.json")
    with exclusive(sweeper.root / f".dvc/tmp/sweep/locks/point-{state.stem}"):
        assert "1 sweeps are running" in sweeper.sweep_here("--clean")[1]
        assert any((sweeper.root / ".dvc/tmp/sweep/work").iterdir())
    sweeper.sweep_here("--clean")
    assert not (sweeper.root / ".dvc/tmp/sweep/work").exists()


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        (("--cfg", "job"), "python stages/compose_params.py --print"),
        (("-c=job",), "python stages/compose_params.py --print"),
        (("--info",), "python stages/sweep.py --list"),
        (("--config-name", "x"), "conf/own/GROUP/NAME.yaml"),
        (("--hydra-help",), "python stages/sweep.py --help"),
    ],
)
def test_a_flag_of_hydra_names_what_replaces_it(
    quick: Sweeper, flag: tuple[str, ...], instead: str
) -> None:
    code, said = quick.sweep_here("-m", "lora.r=4,8", *flag)
    assert code == 1 and "is a flag of Hydra that a sweep does not have" in said
    assert instead in said and "usage" not in said


def test_a_trial_of_an_earlier_sweep_with_other_words_is_found(sweeper: Sweeper) -> None:
    said = sweeper.sweep_here("-m", RATES, "lora.r=8", "trainer.weight_decay=0.1")[1]
    assert re.search(r"dvc exp apply learning_rate=0.01-\w{10} ", said)
    again = ("-m", "trainer.weight_decay=0.1,0.2", "trainer.learning_rate=0.01", "lora.r=8")
    said = sweeper.sweep_here(*again)[1]
    assert "2 trials, 1 already done" in said
    assert re.search(r"weight_decay=0.1-\w+  0  \(had it as learning_rate=0.01-\w+\)", said)
    assert re.search(r"^ +weight_decay +experiment", said.replace("train.validation_loss", "").replace(
        "tuned.exact_match", ""), re.MULTILINE)  # fmt: skip


def test_a_sweep_by_the_test_split_says_so_before_and_after(sweeper: Sweeper) -> None:
    said = sweeper.sweep_here("-m", RATES, "sweep.objective=tuned.exact_match")[1]
    before, after = said.split("started", 1)
    assert "sweep.objective=tuned.exact_match chooses by the test split" in before
    assert "The winner's tuned.exact_match is optimistic" in after


@pytest.mark.parametrize("script", ["stages/train_lora.py", "stages/compose_params.py"])
def test_a_stage_that_is_asked_to_sweep_names_the_way(quick: Sweeper, script: str) -> None:
    said = quick.run("python", script, "-m", "lora.r=4,8", check=False)
    assert "python stages/sweep.py -m lora.r=4,8" in said
