"""From a run in MLflow back to its adapter: the same bytes, others, or the reason why not."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from publishing import Publisher

from capas.core.worktree import git

pytestmark = pytest.mark.slow
FAILS = "import os, sys\nif os.environ.get('NOISE') == 'fail': sys.exit('torch 9.9 is installed')\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return Publisher.make_published(tmp_path_factory.mktemp("rebuild") / "with a blank")


@pytest.fixture
def repository(made: Publisher) -> Iterator[Publisher]:
    """With a run of the committed state; what a test edits is undone."""
    head = git(made.root, "rev-parse", "HEAD")
    made.forget()
    yield made
    made.run("git", "reset", "-q", "--hard", head)
    made.run("git", "clean", "-qfd")
    assert not list((made.root / ".dvc/tmp/rebuild").glob("run-*"))


def test_a_committed_run_is_trained_anew_to_the_same_bytes(
    repository: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    before = repository.state()
    assert repository.capas("rebuild", repository.the_run()[1].id[:8]) == 0
    said = capsys.readouterr().out
    recorded, here = (line.split()[1] for line in said.splitlines()[:2])
    assert recorded == here and len(here) == 64
    assert "retrained in" in said
    assert repository.ran() == {"train": 1, "train 0.004": 1}
    assert repository.state() == before


def test_what_was_not_committed_is_applied_whatever_the_workspace_is_now(
    repository: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository.root / "note.txt").write_text("not committed\n")
    (repository.root / "extra.bin").write_bytes(bytes(range(256)))
    (repository.root / "data/embedded/tokenizer.json").write_bytes(b"\xff\x00")
    repository.edit("fake.py", "import json,", "import  json,")
    repository.train(r=4)
    name = repository.the_run()[1].name
    repository.run("git", "checkout", "-q", ".")
    repository.run("git", "clean", "-qfd")
    repository.forget()
    assert repository.capas("rebuild", name) == 0
    assert repository.ran()["train"] == 1
    assert "identical, byte for byte" in capsys.readouterr().out


def test_another_result_is_told_with_the_stage_that_differs(
    repository: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = repository.the_run()[1].id
    before = repository.state()
    assert repository.capas("rebuild", run_id, NOISE="default") == 1
    said = capsys.readouterr().out
    assert "The adapter differs" in said
    assert "first to differ: train: data/models/adapter" in said
    assert "linear_kernel: default on this machine, torch in the run" in said
    assert repository.capas("rebuild", run_id) == 0, "the cache took the other result"
    assert repository.state() == before


def test_all_runs_what_follows_and_keep_leaves_the_folder(
    repository: Publisher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    run_id = repository.the_run()[1].id
    assert repository.capas("rebuild", run_id, "--all", "--keep", str(kept)) == 0
    assert (repository.ran()["train"], repository.ran()["evaluate"]) == (1, 1)
    assert (kept / "reports/evaluation.json").exists() and not (kept / "mlflow.db").exists()
    assert repository.capas("rebuild", run_id, "--keep", str(kept)) == 2
    assert "already exists" in capsys.readouterr().err


def test_restore_trains_nothing(repository: Publisher, capsys: pytest.CaptureFixture[str]) -> None:
    assert repository.capas("rebuild", repository.the_run()[1].id, "--restore") == 0
    assert repository.ran() == {}
    shutil.move(repository.root / ".dvc/cache", repository.root / ".dvc/gone")
    assert repository.capas("rebuild", repository.the_run()[1].id, "--restore") == 2
    shutil.move(repository.root / ".dvc/gone", repository.root / ".dvc/cache")
    said = capsys.readouterr().err
    assert "no DVC remote is configured" in said and "omit --restore" in said


@pytest.mark.parametrize("where", [(), ("--local",)], ids=["for all", "local"])
def test_a_remote_with_a_relative_path_is_found(
    repository: Publisher, where: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    local, cache = (repository.root / ".dvc" / name for name in ("config.local", "cache"))
    repository.run("dvc", "remote", "add", *where, "-d", "team", f"../store of {len(where)}")
    repository.commit()
    repository.train(r=7)
    repository.run("dvc", "push")
    cache.rename(cache.with_name("gone"))
    run_id = repository.the_run()[1].id
    assert repository.capas("rebuild", run_id, "--restore") == 0, capsys.readouterr().err
    assert "pulling data/models/adapter" in capsys.readouterr().err
    shutil.rmtree(cache)
    cache.with_name("gone").rename(cache)
    local.unlink(missing_ok=True)


def test_a_commit_that_is_gone_is_asked_for_and_told(
    repository: Publisher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First nobody has it; then a remote has."""
    origin = tmp_path / "origin.git"
    repository.run("git", "checkout", "-q", "-b", "side")
    (repository.root / "note.txt").write_text("on a branch\n")
    repository.commit()
    repository.run("git", "clone", "-q", "--bare", str(repository.root), str(origin))
    repository.train(r=2)
    run = repository.the_run()[1]
    repository.run("git", "checkout", "-q", "--force", "main")
    repository.run("git", "branch", "-q", "-D", "side")
    repository.run("git", "reflog", "expire", "--expire=now", "--all")
    repository.run("git", "prune", "--expire=now")
    assert repository.capas("rebuild", run.id) == 2
    assert "there is no git remote" in capsys.readouterr().err
    repository.run("git", "remote", "add", "origin", str(origin))
    refs = git(repository.root, "for-each-ref")
    assert repository.capas("rebuild", run.id) == 0
    assert git(repository.root, "for-each-ref") == refs
    repository.run("git", "remote", "remove", "origin")
    repository.the_run()[0].delete_run(run.id)  # no other test can restore it


@pytest.mark.parametrize("wrong", ["is missing", "has changed"])
def test_an_input_that_git_ignores_is_taken_from_the_workspace_or_missed(
    repository: Publisher, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = repository.root / "data/own/mine.csv"
    own.write_text("a,b\n")
    repository.repro()
    run_id = repository.the_run()[1].id
    (repository.root / "data/own/later.csv").write_text("c\n")
    assert repository.capas("rebuild", run_id) == 0
    own.unlink() if wrong == "is missing" else own.write_text("x\n")
    assert repository.capas("rebuild", run_id) == 2
    assert f"data/own/mine.csv {wrong}" in capsys.readouterr().err
    for file in ("mine.csv", "later.csv"):
        (repository.root / "data/own" / file).unlink(missing_ok=True)


def test_a_patch_of_another_run_is_refused(
    repository: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.train(r=3)
    client, run = repository.the_run()
    name = "source/uncommitted.patch"
    patch = Path(client.download_artifacts(run.id, name)).read_text()
    assert "+r: 3" in patch
    client.log_text(run.id, patch.replace("+r: 3", "+r: 5"), name)
    assert repository.capas("rebuild", run.id) == 2
    assert "the patch belongs to another run" in capsys.readouterr().err
    client.delete_run(run.id)


def test_other_packages_are_told(repository: Publisher, capsys: pytest.CaptureFixture[str]) -> None:
    repository.edit("fake.py", "import json,", FAILS + "import json,")
    repository.train(r=5)
    assert repository.capas("rebuild", repository.the_run()[1].id, NOISE="fail") == 2
    said = capsys.readouterr().err
    assert "the pipeline failed" in said and "torch 9.9 is installed" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rebuild_that_is_stopped_leaves_nothing(repository: Publisher, number: int) -> None:
    before = repository.state()
    repository.hold("train")
    process = subprocess.Popen(
        [sys.executable, "-m", "capas", "rebuild", repository.the_run()[1].id],
        cwd=repository.root,
        env=repository._env(FAKE_HOME=str(repository.root)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    repository.wait_for("train")
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    repository.let_go()
    assert repository.state() == before


def test_what_a_killed_rebuild_left_goes_with_the_next(repository: Publisher) -> None:
    repository.hold("train")
    run_id = repository.the_run()[1].id
    process = subprocess.Popen(
        [sys.executable, "-m", "capas", "rebuild", run_id],
        cwd=repository.root,
        env=repository._env(FAKE_HOME=str(repository.root)),
        stderr=subprocess.DEVNULL,
    )
    repository.wait_for("train")
    process.kill()
    process.wait()
    repository.let_go()
    (left,) = (repository.root / ".dvc/tmp/rebuild").glob("run-*.lock")
    assert left.with_suffix("").is_dir()
    assert repository.capas("rebuild", run_id) == 0


@pytest.mark.parametrize(
    ("word", "expected"),
    [("nothing", "MLflow has no training run 'nothing'"), ("", "matches 2 runs")],
)
def test_a_word_that_names_no_run_or_several(
    repository: Publisher, word: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.train(r=6)
    assert repository.capas("rebuild", word) == 2
    assert expected.replace("2 runs", "") in capsys.readouterr().err


def test_without_a_store_nothing_is_created(
    repository: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    database = repository.root / "mlflow.db"
    database.rename(repository.root / "gone.db")
    assert repository.capas("rebuild", "x") == 2
    assert "no run was published in this workspace" in capsys.readouterr().err
    assert not database.exists()
    (repository.root / "gone.db").rename(database)
