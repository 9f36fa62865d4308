"""Hands the rows of a running training to a process of its own that sends them to a tracker.

Importing a tracker takes seconds and its server may be slow or gone: the training appends lines to a file
and waits for nobody. The follower reads the file; its standard input is a pipe that is never written to,
so that it sees the training's end even where that was killed.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_FOLLOWER = "capas.tracking"


class Rows:
    """Appends rows to a file, one JSON object a line; without a file it forgets them."""

    def __init__(self, lines: TextIO | None) -> None:
        self._lines = lines

    def append(self, row: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(json.dumps(row) + "\n")
            self._lines.flush()


@contextmanager
def tracker(root: Path, key: str, enabled: bool) -> Iterator[Rows]:
    """A detached follower of the training `key` in the repository `root`, for as long as the block lasts.

    The file ends with {"event": "end"} where the block succeeded and {"event": "failed"} where it raised.
    """
    if not enabled or importlib.util.find_spec(_FOLLOWER) is None:
        yield Rows(None)
        return
    folder = root / ".dvc/tmp/live"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.jsonl").open("w", encoding="utf-8") as lines:
        rows = Rows(lines)
        follower = _follow(root, key, folder)
        event = "failed"
        try:
            yield rows
            event = "end"
        finally:
            rows.append({"event": event})
            if follower.stdin is not None:
                follower.stdin.close()


def _follow(root: Path, key: str, folder: Path) -> "subprocess.Popen[bytes]":
    command = ["-m", _FOLLOWER, "follow", "--key", key, "--rows", str(folder / f"{key}.jsonl")]
    with (folder / f"{key}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
