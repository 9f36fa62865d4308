"""What DVC runs in a folder of its own (`--temp`, the queue): that folder's code, the user's commit."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sweeping import Sweeper
from workspace import REPOSITORY

from capas.core.worktree import git

# What evaluate knows of its code and its origin, noted in the user's repository.
NOTES = """
if stage == "evaluate":
    import capas.core.cores
    from capas.tracking.lineage import state_of
    state = state_of(Path.cwd())
    facts = [capas.core.cores.__file__, state.taken.commit, state.patch.decode()]
    (home / ".dvc/tmp/noted").write_text(json.dumps([*facts, getattr(capas.core.cores, "LATER", None)]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sweeper:
    sweeper = Sweeper.make(tmp_path_factory.mktemp("temp"))
    with (sweeper.root / "fake.py").open("a") as fake:
        fake.write(NOTES)
    sweeper.repro()
    sweeper.commit()
    return sweeper


def noted(sweeper: Sweeper) -> list[str]:
    facts: list[str] = json.loads(sweeper.read(".dvc/tmp/noted"))
    return facts


def test_a_module_comes_from_the_folder_in_which_a_stage_runs(tmp_path: Path) -> None:
    """The editable install names another checkout: here that of the tests."""
    folder = tmp_path / "exp"
    (folder / "capas/core").mkdir(parents=True)
    (folder / "stages").mkdir()
    (folder / "dvc.yaml").write_text("stages: {}\n")
    (folder / "capas/__init__.py").write_text('"""Another revision."""\n')
    (folder / "capas/core/cores.py").write_text("WHERE = 'in the folder'\n")
    (folder / "stages/fake.py").write_text("from capas.core.cores import WHERE\nprint(WHERE)\n")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "stages/fake.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "in the folder\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["workspace", "temp", "queue", "sweep"])
def test_an_experiment_has_the_code_that_it_started_with_and_the_users_commit(
    made: Sweeper, way: str
) -> None:
    seed = f"dataset.seed={['workspace', 'temp', 'queue', 'sweep'].index(way) + 1}"
    base = git(made.root, "rev-parse", "HEAD")
    (made.root / "note.txt").write_text(f"not committed, {way}\n")
    made.hold("train")
    made.forget()

    def edit_while_it_runs() -> None:
        made.wait_for("train")
        if way != "workspace":
            with (made.root / "capas/core/cores.py").open("a") as code:
                code.write("LATER = 1\n")
        made.let_go()

    beside = threading.Thread(target=edit_while_it_runs)
    beside.start()
    try:
        commands = {
            "workspace": [["dvc", "exp", "run", "-S", seed]],
            "temp": [["dvc", "exp", "run", "--temp", "-S", seed]],
            "queue": [
                ["dvc", "exp", "run", "--queue", "-S", seed],
                ["dvc", "exp", "run", "--run-all"],
            ],
            "sweep": [[sys.executable, "stages/sweep.py", seed]],
        }
        for command in commands[way]:
            made.run(*command, CAPAS_HOME=str(made.root))
    finally:
        beside.join()
        made.run("git", "checkout", "-q", "capas")
    code, commit, patch, later = noted(made)
    assert later is None
    assert Path(code).is_relative_to(made.root)
    assert (code == str(made.root / "capas/core/cores.py")) == (way == "workspace")
    assert commit == base
    assert f"+not committed, {way}" in patch and "LATER" not in patch
    made.run("git", "checkout", "-q", ".")
