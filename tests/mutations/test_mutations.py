"""Every mutation of mutations.py fits the code, and the default tests notice it."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation
from workspace import REPOSITORY, Workspace, make_workspace

PASSED, FAILED = 0, 1  # pytest's exit codes; 2 to 5: it could not run the tests, or found none
NOT_INHERITED = ("PYTHON", "PYTEST", "DVC_", "GIT_", "MLFLOW_")


def test_every_mutation_fits_the_code() -> None:
    misfits = [m.name for m in MUTATIONS if (REPOSITORY / m.file).read_text().count(m.old) != 1]
    assert misfits == []
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) == 45


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A copy of the repository, to be mutated."""
    return make_workspace(tmp_path_factory.mktemp("mutated"))


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_default_tests_notice_it(mutation: Mutation, workspace: Workspace) -> None:
    code, said = unmutated(workspace, mutation.tests)
    assert code == PASSED, said
    file = workspace.root / mutation.file
    text = file.read_text(encoding="utf-8")
    workspace.edit(mutation.file, mutation.old, mutation.new)
    try:
        code, said = run_tests(workspace.root, mutation.tests)
    finally:
        file.write_text(text, encoding="utf-8")
    assert code == FAILED, f"{mutation.harm} Nothing noticed it:\n{said}"


@cache
def unmutated(workspace: Workspace, tests: tuple[str, ...]) -> tuple[int, str]:
    """As `run_tests`, once for the same tests."""
    return run_tests(workspace.root, tests)


def run_tests(root: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """The exit code of pytest in `root`, whose code it imports, and what it said."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests, "-p", "no:cacheprovider", "-n", "0"],
        cwd=root,
        # An edit within the same second would leave the bytecode of the text before in use.
        env={**inherited, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout
