"""What `make repro` says where a machine computes other bytes than those of the committed dvc.lock."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from capas.models import kernels
from capas.workspace import reproduced

RAW, ADAPTER, SCORES = "data/raw", "data/models/adapter", "reports/metrics/tuned.json"
LOCK: dict[str, Any] = {
    "fetch": {
        "cmd": "f",
        "params": {"params.yaml": {"seed": 0}},
        "outs": [{"path": RAW, "md5": "1"}],
    },
    "train": {
        "cmd": "t",
        "deps": [{"path": RAW, "md5": "1"}],
        "outs": [{"path": ADAPTER, "md5": "2"}],
    },
    "evaluate": {
        "cmd": "e",
        "deps": [{"path": ADAPTER, "md5": "2"}],
        "outs": [{"path": SCORES, "md5": "3"}],
    },
}


def write(root: Path, lock: dict[str, Any], score: float, instruction_set: str) -> None:
    (root / "reports/metrics").mkdir(parents=True, exist_ok=True)
    (root / reproduced.LOCK).write_text(yaml.safe_dump({"stages": lock}))
    (root / SCORES).write_text(json.dumps({"loss": 0.5, "exact_match": score, "perplexity": score}))
    values = {"hardware": {"instruction_set": instruction_set}}
    (root / "params.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, LOCK, 0.918, "portable")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for words in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-q", "-m", "test")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def other_bytes(**md5: str) -> dict[str, Any]:
    """LOCK, with other outputs of the stages named, and of what follows from them."""
    lock = copy.deepcopy(LOCK)
    for stage, value in md5.items():
        path, old = lock[stage]["outs"][0].values()
        for entry in lock.values():
            for part in (*entry.get("deps", []), *entry["outs"]):
                if (part["path"], part["md5"]) == (path, old):
                    part["md5"] = value
    return lock


def test_the_committed_results_and_edits_of_ones_own_are_no_difference(root: Path) -> None:
    assert reproduced.describe(root) == ""
    edited = other_bytes(fetch="9", train="8")
    edited["fetch"]["params"]["params.yaml"]["seed"] = 1
    write(root, edited, 0.5, "portable")
    assert reproduced.describe(root) == ""


def test_the_first_stage_that_differs_is_named_with_both_scores(root: Path) -> None:
    write(root, other_bytes(train="8", evaluate="7"), 0.916, "native")
    said = reproduced.describe(root)
    assert "train is the first stage that differs (data/models/adapter)" in said
    assert kernels.cpu()["model"] in said
    assert "committed -> here: exact_match 0.918 -> 0.916." in said
    assert "This is harmless" in said
    assert "git checkout dvc.lock reports && dvc checkout" in said


def test_portable_kernels_on_x86_have_no_excuse(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, other_bytes(train="8"), 0.918, "portable")
    for is_x86, expected in (
        (True, "should not happen on an x86 CPU"),
        (False, "harmless"),
    ):
        monkeypatch.setattr(kernels, "is_x86", lambda is_x86=is_x86: is_x86)
        said = reproduced.describe(root)
        assert expected in said
        assert "The scores equal the committed ones." in said


def test_outside_of_git_nothing_is_said_and_the_exit_code_is_zero(tmp_path: Path) -> None:
    write(tmp_path, LOCK, 0.918, "portable")
    done = subprocess.run(
        [sys.executable, "-m", "capas.workspace.reproduced"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
