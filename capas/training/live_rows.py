"""Pass the log rows of a running training to a separate process, which sends them to a tracker.

Importing a tracker takes seconds, and its server may be slow or unreachable. The training therefore only
appends lines to a file and never waits. The follower reads the file. Its standard input is a pipe that is
never written to, so that it notices the end of the training even if that was killed.
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
from capas.core.errors import CapasError, Paused

log = logging.getLogger("capas")
_FOLLOWER = "capas.tracking.live_sender"
UNUSABLE, AWAY = 2, 3  # exit codes of the check; any other except 0 is a defect of the check
_CHECK_SECONDS = 60.0


class Rows:
    """A file to which rows are appended, one JSON object a line; without a file the rows are discarded."""

    def __init__(self, lines: TextIO | None) -> None:
        self._lines = lines

    def append(self, row: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(json.dumps(row) + "\n")
            self._lines.flush()


def start_check(root: Path, enabled: bool) -> Callable[[], None]:
    """Start a process that checks whether the result can be published, while the training loads.

    Returns:
        A function to call before the first step. It raises CapasError if no later `publish` could succeed: a
        package, credentials or a location are missing. If the tracker is unreachable, it only logs a warning.
    """
    if not enabled or not read_yaml(root / "params.yaml")["tracking"]["enabled"]:
        return lambda: None
    started = subprocess.Popen(
        [sys.executable, "-m", _FOLLOWER, "check"],
        cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def finish() -> None:
        try:
            output, trace = started.communicate(timeout=_CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()
            log.warning("MLflow did not answer within %.0f s; training continues", _CHECK_SECONDS)
            return
        if started.returncode == UNUSABLE:
            raise CapasError(
                f"the result could not be published: {output}\nTo train without MLflow: tracking=none"
            )
        if started.returncode:
            log.warning("training continues without MLflow: %s", output or trace.strip())

    return finish


@contextmanager
def tracker(root: Path, key: str, enabled: bool) -> Iterator[Rows]:
    """Run a detached follower of the training `key` in the repository `root` while the block lasts.

    Yields:
        The rows of the training. Their file ends with {"event": "end"} if the block succeeded, with
        {"event": "paused"} if it paused, and with {"event": "failed"} if it raised anything else.
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
        except Paused:
            event = "paused"
            raise
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
