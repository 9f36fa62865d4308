"""Rows go to a follower that the training does not wait for, and that notices how the training ended."""

import json
import os
import time
from pathlib import Path

import pytest

from capas.training import live_rows

FOLLOWER = """
import pathlib, sys
rows = pathlib.Path(sys.argv[sys.argv.index("--rows") + 1])
sys.stdin.read()  # returns when the training is gone
rows.with_suffix(".seen").write_text(rows.read_text())
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for capas.tracking.live_sender: it copies the rows once its standard input is closed."""
    (tmp_path / "stand_in.py").write_text(FOLLOWER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(live_rows, "_FOLLOWER", "stand_in")
    return tmp_path


def seen(root: Path) -> list[dict[str, object]]:
    file = root / ".dvc/tmp/live/key.seen"
    deadline = time.monotonic() + 30
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline, (root / ".dvc/tmp/live/key.log").read_text()
        time.sleep(0.05)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_and_the_end_reach_the_follower(root: Path) -> None:
    with live_rows.tracker(root, "key", enabled=True) as rows:
        rows.append({"step": 1, "loss": 2.5})
    assert seen(root) == [{"step": 1, "loss": 2.5}, {"event": "end"}]


def test_failure_is_told_apart_from_the_end(root: Path) -> None:
    with (
        pytest.raises(ValueError, match="nan"),
        live_rows.tracker(root, "key", enabled=True) as rows,
    ):
        rows.append({"step": 1})
        raise ValueError("nan")
    assert seen(root)[-1] == {"event": "failed"}


def test_a_killed_training_leaves_no_last_line(root: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with live_rows.tracker(root, "key", enabled=True) as rows:
            rows.append({"step": 1})
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert seen(root) == [{"step": 1}]


def test_nothing_is_started_where_tracking_is_off(root: Path) -> None:
    with live_rows.tracker(root, "key", enabled=False) as rows:
        rows.append({"step": 1})
    assert not (root / ".dvc").exists()
