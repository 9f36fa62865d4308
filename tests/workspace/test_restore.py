"""What an experiment leaves behind that failed, was killed or interrupted, and what `capas restore` does."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_pipeline import Small
from sweeping import Sweeper, wait
from workspace import REPOSITORY, Workspace, make_workspace, stages_run

from capas.workspace import unfinished
from capas.workspace.experiment_recovery import REPLACED

WORSE, OTHER = (
    "trainer.learning_rate=0.9",
    "trainer.learning_rate=0.02",
)  # the first one's training fails
DATA = ("data/raw", "data/models/quantized", "data/models/adapter", "reports/evaluation.json")


class Experimenter(Sweeper):
    """Starts `dvc exp run` in a process group of its own, as a terminal does."""

    def start_experiment(self, *words: str) -> "subprocess.Popen[str]":
        return self.start("dvc", "exp", "run", *words, CAPAS_HOME=str(self.root))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Experimenter:
    return Experimenter.make(tmp_path_factory.mktemp("restore") / "home")


@pytest.fixture
def edited(finished: Experimenter, tmp_path: Path) -> Experimenter:
    return edit(finished.copy(tmp_path / "home"))


def edit(made: Experimenter) -> Experimenter:
    """Work that is not committed: in conf/, partly staged, and in new files; and an older stash."""
    (made.root / "note.txt").write_text("stashed\n")
    made.run("git", "stash", "-q")
    made.edit("conf/config.yaml", "seed: 0", "seed: 0 # mine")
    (made.root / "note.txt").write_text("staged\n")
    made.run("git", "add", "note.txt")
    (made.root / "note.txt").write_text("edited after that\n")
    (made.root / "new.txt").write_text("new and staged\n")
    made.run("git", "add", "new.txt")
    (made.root / "own.txt").write_text("new\n")
    return made


def state(made: Workspace) -> dict[str, Any]:
    """All that a user may lose: HEAD, what is staged, stashes, files and data."""
    listed = made.run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = {*filter(None, listed.split("\0")), *DATA, "reports/.published"}
    files = {n: made.root / n for n in names if (made.root / n).is_file()}
    return {
        "HEAD": made.read(".git/HEAD"),
        "staged": made.run("git", "write-tree"),
        "stashes": made.run("git", "stash", "list"),
        "left by DVC": made.run("git", "for-each-ref", "refs/exps/stash", "refs/exps/exec/EXEC_M*"),
        **{name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()},
    }


def changed(made: Workspace, before: dict[str, Any]) -> set[str]:
    now = state(made)
    return {name for name in {*before, *now} if before.get(name) != now.get(name)}


LEFT = {"params.yaml", "conf/overrides.yaml", "dvc.lock", "reports/metrics/train.json"}


def test_an_experiment_that_fails_leaves_the_workspace_as_it_was(edited: Experimenter) -> None:
    (edited.root / "reports/.published").write_text("a marker that git and the cache do not have\n")
    before = state(edited)
    said = edited.run("dvc", "exp", "run", "-S", WORSE, check=False)
    assert "the loss is nan" in said
    assert changed(edited, before) == set()
    back = ", ".join(sorted(LEFT - {"reports/metrics/train.json"}))
    assert f"as it was before `dvc exp run -S {WORSE}`; restored: {back}" in said
    assert said.index("ERROR: failed to reproduce 'train'") < said.index("capas: the workspace is")
    (replaced,) = (edited.root / REPLACED).glob("*/conf/overrides.yaml")
    assert "learning_rate: 0.9" in replaced.read_text()
    assert edited.restore() == "nothing to restore\n"
    assert edited.ran()["fetch"] == 0


def test_an_experiment_that_is_killed_is_put_back_by_restore(edited: Experimenter) -> None:
    """SIGKILL to DVC and its stage, after the training."""
    before = state(edited)
    edited.hold("evaluate")
    process = edited.start_experiment("-S", OTHER)
    edited.wait_for("evaluate")
    assert "is running" in edited.restore(code=2)
    assert edited.restore("--quiet") == ""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    edited.let_go()
    assert {*LEFT, "data/models/adapter", "HEAD", "staged", "left by DVC"} <= changed(
        edited, before
    )

    refused = edited.run("python", "stages/compose_params.py", check=False)
    assert f"`dvc exp run -S {OTHER}` was killed" in refused
    assert "capas restore --keep" in refused
    edited.run("python", "stages/compose_params.py", "--check")
    edited.edit("conf/config.yaml", "# mine", "# mine, edited since")
    mine = edited.read("conf/config.yaml")
    said = edited.restore()
    assert "HEAD is back on the branch main" in said
    assert changed(edited, before) == {"conf/config.yaml"}
    assert edited.read("conf/config.yaml") == mine
    assert edited.restore() == "nothing to restore\n"


def interrupt(edited: Experimenter, times: int) -> str:
    edited.hold("train")
    process = edited.start_experiment("-S", OTHER)
    edited.wait_for("train")
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    said = process.communicate()[0]
    assert process.returncode != 0
    return said


@pytest.mark.slow
def test_an_experiment_that_is_interrupted_leaves_the_workspace_as_it_was(
    edited: Experimenter,
) -> None:
    before = state(edited)
    said = interrupt(edited, times=3)
    assert "checkpoints are kept: the same command resumes" in said
    assert changed(edited, before) == set()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ended_at_any_moment_nothing_of_the_users_is_lost(
    finished: Experimenter, tmp_path: Path, number: signal.Signals
) -> None:
    """From DVC's first stash to its last commit; Ctrl-C twice, which keeps DVC from tidying up."""
    seconds, turn, ended = 0.3, 0, False
    while not ended:
        made = edit(finished.copy(tmp_path / str(turn)))
        before = state(made)
        process = made.start_experiment("-S", OTHER)
        try:
            said = process.communicate(timeout=seconds)[0]
            ended = True
        except subprocess.TimeoutExpired:
            for _ in range(1 if number == signal.SIGKILL else 2):
                os.killpg(process.pid, number)
                time.sleep(0.03)
            said = process.communicate()[0]
        if process.returncode and "have been applied to your workspace" not in said:
            said += made.restore()
            # Interrupted before DVC did anything but stash them, or before it dropped the stash again.
            for words in (("pop", "--index"), ("drop",)):
                if f"git stash {' '.join(words)}" in said:
                    made.run("git", "stash", words[0], "--quiet", *words[1:])
            assert changed(made, before) == set(), f"after {seconds} s:\n{said}"
        seconds, turn = seconds + 0.31, turn + 1
    assert turn > 10


def test_what_a_killed_experiment_left_can_be_kept(edited: Experimenter) -> None:
    begin(edited, phase=unfinished.RUNNING)
    edited.edit("params.yaml", "seed: 0\n", "seed: 1\n")
    before = state(edited)
    assert "stays as `dvc exp run -S lora.r=8` left it" in edited.restore("--keep")
    assert changed(edited, before) == {"HEAD"}
    assert unfinished.read(edited.root) is None


def begin(made: Workspace, phase: str) -> None:
    """The record of an experiment whose process is gone, and HEAD as DVC detaches it."""
    code = (
        "import sys; from pathlib import Path; from capas.workspace import experiment_recovery, unfinished\n"
        "experiment_recovery.begin(Path(), ['dvc', 'exp', 'run', '-S', 'lora.r=8'])\n"
        f"if {phase!r} == unfinished.RUNNING: unfinished.mark_running(Path())"
    )
    head = made.run("git", "rev-parse", "HEAD").strip()
    made.run("git", "checkout", "-q", head)
    made.run("python", "-c", code)


@pytest.mark.slow
def test_another_experiment_does_not_begin_on_what_a_killed_one_left(
    edited: Experimenter,
) -> None:
    begin(edited, phase=unfinished.RUNNING)
    before = state(edited)
    said = edited.run("dvc", "exp", "run", "-S", OTHER, check=False)
    assert "an earlier experiment was killed: `dvc exp run -S lora.r=8`" in said
    assert "Traceback" not in said
    assert changed(edited, before) == set()


def test_commits_that_were_made_since_are_left_alone(edited: Experimenter) -> None:
    begin(edited, phase=unfinished.RUNNING)
    edited.edit("params.yaml", "seed: 0\n", "seed: 1\n")
    edited.commit()
    before = state(edited)
    assert "there are newer commits: nothing was restored" in edited.restore()
    assert changed(edited, before) == set()


def in_stash(made: Workspace) -> dict[str, Any]:
    """DVC in the moment after it has stashed the user's edits; returns the state before."""
    before = state(made)
    head = made.run("git", "rev-parse", "HEAD").strip()
    made.run("git", "stash", "-q")
    made.run("git", "checkout", "-q", "--detach", head)
    return before


def lock_of_dvc(made: Workspace) -> Path:
    """DVC's lock for its stash of experiments, held by a process that is gone."""
    file = made.root / ".dvc/tmp/exps/rwlock"
    gone = subprocess.Popen(["true"])
    gone.wait()
    file.parent.mkdir(parents=True, exist_ok=True)
    held = {"write": {"refs/exps/stash": {"pid": gone.pid, "cmd": "dvc exp run"}}, "read": {}}
    file.write_text(json.dumps(held))
    return file


def test_a_stash_that_nobody_can_tell_from_the_users_own_is_named(edited: Experimenter) -> None:
    before = state(edited)
    edited.run("git", "stash", "-q")
    said = edited.restore()
    assert "git has a stash of edits" in said and "git stash pop --index" in said
    assert "nothing to restore" not in said
    edited.run("git", "stash", "pop", "-q", "--index")
    assert changed(edited, before) == set()
    assert edited.restore() == "nothing to restore\n"  # an older stash lies on another commit


def test_a_stash_of_edits_that_are_in_the_files_is_named(edited: Experimenter) -> None:
    """Interrupted after DVC brought the edits back, and before it dropped its stash."""
    before = state(edited)
    edited.run("git", "stash", "-q")
    edited.run("git", "stash", "apply", "-q", "--index")
    assert changed(edited, before) == {"stashes"}
    assert "remove it: git stash drop" in edited.restore()
    edited.run("git", "stash", "drop", "-q")
    assert changed(edited, before) == set()
    assert edited.restore() == "nothing to restore\n"


def test_edits_that_dvc_holds_in_a_stash_come_back(edited: Experimenter) -> None:
    """Killed before the plugin is loaded: there is DVC's lock, and no record."""
    lock_of_dvc(edited)
    before = in_stash(edited)
    assert "conf/config.yaml" in changed(edited, before)
    assert "; restored: " in edited.restore("--quiet")
    assert changed(edited, before) == set()


def test_edits_outside_of_the_repositorys_folder_come_back_too(tmp_path: Path) -> None:
    """Git's top folder holds another project as well."""
    Small.make(tmp_path / "capas")
    shutil.rmtree(tmp_path / "capas/.git")
    made, top = Small(tmp_path / "capas"), Workspace(tmp_path)
    other = tmp_path / "other/params.yaml"
    other.parent.mkdir()
    other.write_text("committed\n")
    top.run("git", "init", "-q", "-b", "main")
    top.commit()
    other.write_text("edited\n")
    made.edit("conf/config.yaml", "seed: 0", "seed: 0 # mine")
    lock_of_dvc(made)
    top.run("git", "stash", "-q")
    top.run("git", "checkout", "-q", "--detach", "HEAD")
    made.restore()
    assert other.read_text() == "edited\n"
    assert "# mine" in made.read("conf/config.yaml")
    assert top.run("git", "stash", "list") == ""


def test_edits_in_a_stash_of_a_dvc_that_was_interrupted_twice_come_back(
    edited: Experimenter,
) -> None:
    """Its lock is released; the reflog of HEAD tells. `make repro` does not guess."""
    before = in_stash(edited)
    assert edited.restore("--quiet") == ""
    assert "; restored: " in edited.restore()
    assert changed(edited, before) == set()


def test_a_stash_of_the_users_own_stays(edited: Experimenter) -> None:
    edited.run("git", "stash", "-q")
    time.sleep(1.1)
    lock_of_dvc(edited)
    edited.run("git", "checkout", "-q", "--detach", "HEAD")
    before = state(edited)
    assert "HEAD is back on the branch main" in edited.restore()
    assert changed(edited, before) == {"HEAD"}


def test_a_file_that_was_edited_since_stays_and_so_does_the_stash(edited: Experimenter) -> None:
    lock_of_dvc(edited)
    in_stash(edited)
    (edited.root / "note.txt").write_text("written since\n")
    edited.restore()
    assert edited.read("note.txt") == "written since\n"
    assert "# mine" in edited.read("conf/config.yaml")
    assert edited.run("git", "stash", "list").count("WIP") == 2


@pytest.mark.slow
def test_a_queued_experiment_needs_nothing(edited: Experimenter) -> None:
    before = state(edited)
    said = edited.run("dvc", "exp", "run", "--queue", "-S", OTHER)
    assert "capas:" not in said
    assert changed(edited, before) == set()
    assert unfinished.read(edited.root) is None


@pytest.mark.slow
def test_an_experiment_in_a_folder_of_its_own_needs_nothing(edited: Experimenter) -> None:
    """While it runs, another one may begin."""
    before = state(edited)
    edited.hold("train")
    process = edited.start_experiment("--temp", "-S", OTHER)
    wait(lambda: "train 0.02" in edited.ran(), 60)
    assert unfinished.read(edited.root) is None
    assert not unfinished.is_running(edited.root)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert changed(edited, before) == set()


# dvc.lock and lock files


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small.make(tmp_path / "small")


@pytest.mark.parametrize("length", [0, 30, 700, -1])
def test_a_lock_that_was_cut_is_whole_again(small: Small, length: int) -> None:
    whole = small.read("dvc.lock")
    (small.root / "dvc.lock").write_text(whole[:length])
    assert "dvc.lock was repaired" in small.restore("--quiet")
    assert small.read("dvc.lock") == whole
    assert small.restore("--quiet") == ""


def test_a_lock_without_a_commit_keeps_what_is_whole(small: Small) -> None:
    whole = small.read("dvc.lock")
    small.run("git", "rm", "-q", "--cached", "dvc.lock")
    small.run("git", "commit", "-q", "-m", "No lock")
    (small.root / "dvc.lock").write_text(whole[: whole.index("  train:\n") + 40])
    small.restore()
    assert small.read("dvc.lock") == whole[: whole.index("  train:\n")]
    (small.root / "dvc.lock").write_text("schema: '2")
    small.restore()
    assert not (small.root / "dvc.lock").exists()


def test_a_params_yaml_that_is_not_yaml_is_composed_anew_and_kept(small: Small) -> None:
    whole = small.read("params.yaml")
    (small.root / "params.yaml").write_text(whole[:120] + "\n  r: [8")
    assert "params.yaml is not valid YAML" in small.restore()
    assert small.read("params.yaml") == whole
    (kept,) = (small.root / REPLACED).glob("*/params.yaml")
    assert kept.read_text().endswith("r: [8")


@pytest.mark.parametrize("length", [0, -30])
def test_locks_and_the_index_that_a_kill_left_are_mended(small: Small, length: int) -> None:
    git_index, rwlock = small.root / ".git/index", small.root / ".dvc/tmp/rwlock"
    (small.root / ".git/index.lock").touch()
    rwlock.parent.mkdir(parents=True)
    rwlock.write_text('{"write": {')
    git_index.write_bytes(git_index.read_bytes()[:length])
    said = small.restore()
    for sentence in ("removed git's index.lock", "removed .dvc/tmp/rwlock", "index was truncated"):
        assert sentence in said
    assert small.run("git", "status", "--porcelain") == ""


def test_a_lock_of_git_that_is_held_stays(small: Small) -> None:
    """An editor that writes a message holds it for hours."""
    lock = small.root / ".git/index.lock"
    (small.root / "conf/config.yaml").write_text("{}\n")
    editor = "touch .git/ready; sleep 60"
    process = subprocess.Popen(
        ["git", "commit", "-a"],
        cwd=small.root,
        env=small._env(GIT_EDITOR=f"sh -c '{editor}'"),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait(lambda: (small.root / ".git/ready").exists())
    assert lock.exists()
    assert "a running git command holds" in small.restore(code=2)
    assert lock.exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_where_nothing_is_wrong_it_costs_nothing_and_make_repro_begins_with_it() -> None:
    code = (
        "import sys, capas.workspace.restore as r\nfrom pathlib import Path\n"
        "assert r.restore(Path(), guess=False) == ([], 0)\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'dvc', 'hydra', 'omegaconf', 'torch'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "\t@python -m capas.workspace.restore --quiet\n\tdvc repro\n" in makefile


# The real pipeline


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_ctrl_c_in_a_training_under_dvc_saves_a_checkpoint_and_it_goes_on(
    tmp_path: Path, shell: str
) -> None:
    """DVC, its shell and the stage get SIGINT together, as in a terminal."""
    made = make_workspace(tmp_path)
    made.edit("conf/config.yaml", "experiment: none", "experiment: quick")
    made.edit("conf/trainer/quick.yaml", "max_steps: 20", "max_steps: 400")
    made.edit("conf/trainer/quick.yaml", "save_steps: 5", "save_steps: 1000")
    process = made.start("dvc", "repro", "train", SHELL=shell)
    live = made.root / ".dvc/tmp/live"
    wait(lambda: any('"step": 2' in f.read_text() for f in live.glob("*.jsonl")), 600)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode != 0
    assert "saving a checkpoint after this step; Ctrl-C again stops at once" in said
    assert "A checkpoint was saved: the same command resumes from it" in said
    step = said.split("stopped by Ctrl-C at step ")[1].split()[0]
    made.edit("conf/trainer/quick.yaml", "save_steps: 1000", "save_steps: 1000 # as it was")
    assert list((made.root / ".dvc/tmp/checkpoints").glob(f"train-*/checkpoint-{step}"))
    process = made.start("dvc", "repro", "train", SHELL=shell)
    lines = iter(process.stdout or ())
    assert any(f"resuming from checkpoint-{step}" in line for line in lines)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_killed_experiment_of_the_real_pipeline_goes_on_after_the_restore(tmp_path: Path) -> None:
    """And a newer upstream is merged into the clone of somebody who has a value and a lock of his own."""
    upstream = make_workspace(tmp_path / "upstream")
    upstream.edit("conf/config.yaml", "experiment: none", "experiment: quick")
    upstream.repro()
    upstream.commit()
    upstream.run("git", "clone", "-q", ".", str(tmp_path / "user"))
    user = Workspace(tmp_path / "user")
    user.run("cp", "-r", str(upstream.root / ".dvc/cache"), ".dvc/")
    user.repro()
    assert user.run("git", "status", "--porcelain") == ""

    before = state(user)
    folder = user.root / ".dvc/tmp/checkpoints"
    words = ["dvc", "exp", "run", "-S", "lora.r=4"]
    process = subprocess.Popen(words, cwd=user.root, env=user._env(), start_new_session=True)
    wait(lambda: len(list(folder.glob("train-*/checkpoint-*/complete.json"))) > 1, 600)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "params.yaml" in changed(user, before)
    user.run("python", "-m", "capas", "restore")
    assert changed(user, before) == set()
    assert "train: resuming from checkpoint-" in user.run(*words)
    user.commit()

    upstream.edit("stages/quantize_model.py", '"""', '"""Here is more to read. ')
    upstream.edit("conf/generation/_base.yaml", "seed: 0", "seed: 1")
    upstream.repro()
    upstream.commit()
    said = user.run("python", "-m", "capas.workspace.update")
    assert "resolved: " in said and "dvc.lock" in said
    assert user.run("git", "status", "--porcelain") == ""
    params = user.read("params.yaml")
    assert "  r: 4\n" in params and "<<<<" not in params
    due = user.run("python", "-m", "capas.workspace.due")
    assert "  quantize" not in due and "  sample" in due
    user.run("cp", "-rn", str(upstream.root / ".dvc/cache"), ".dvc/")
    ran = [s for s in stages_run(user.repro()) if s not in ("compose", "publish")]
    assert ran == ["sample", "report"]
