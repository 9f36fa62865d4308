"""Hands the rows of a running training to a process of its own that sends them to a tracker.

Importing a tracker takes seconds and its server may be slow or gone: the training appends lines to a file
and waits for nobody. The follower reads the file; its standard input is a pipe that is never written to,
so that it sees the training's end even where that was killed.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from capas.core.dag import read_yaml
from capas.core.errors import CapasError

log = logging.getLogger("capas")
_FOLLOWER = "capas.tracking.live_sender"
UNUSABLE, AWAY = 2, 3  # exit codes of its check; any other but 0 is a defect of its own
_CHECK_SECONDS = 60.0


class Rows:
    """Appends rows to a file, one JSON object a line; without a file it forgets them."""

    def __init__(self, lines: TextIO | None) -> None:
        self._lines = lines

    def append(self, row: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(json.dumps(row) + "\n")
            self._lines.flush()


def start_check(root: Path, enabled: bool) -> Callable[[], None]:
    """Look in a process of its own whether the result can be published; the training loads meanwhile.

    Returns:
        What is called before the first step. It raises CapasError where no later `publish` could help: a
        package, credentials or a place are missing. A tracker that is away costs a warning.
    """
    if not enabled or not read_yaml(root / "params.yaml")["tracking"]["enabled"]:
        return lambda: None
    started = subprocess.Popen(
        [sys.executable, "-m", _FOLLOWER, "check"],
        cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def finish() -> None:
        try:
            told, trace = started.communicate(timeout=_CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()
            log.warning("MLflow did not answer within %.0f s; training continues", _CHECK_SECONDS)
            return
        if started.returncode == UNUSABLE:
            raise CapasError(
                f"the result could not be published: {told}\nTo train without MLflow: tracking=none"
            )
        if started.returncode:
            log.warning("training continues without MLflow: %s", told or trace.strip())

    return finish


@contextmanager
def tracker(root: Path, key: str, enabled: bool) -> Iterator[Rows]:
    """A detached follower of the training `key` in the repository `root`, for as long as the block lasts.

    The file ends with {"event": "end"} where the block succeeded and {"event": "failed"} where it raised.
    """
    if not enabled:
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
