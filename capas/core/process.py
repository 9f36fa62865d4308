"""Run a command, follow its output, and end it when this process ends."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError

_SECONDS_BETWEEN_LOOKS = 0.2
_NUM_LAST = 12  # last lines of the log shown if the command fails


def follow(
    command: list[str],
    work: Path,
    env: dict[str, str],
    log: Path,
    look: Callable[[], None],
    held: Sequence[int] = (),
) -> Iterator[str]:
    """Run a command in the folder `work`, and yield its lines as they come; they also go to `log`.

    Args:
        look: a function that is called several times a second while the command runs.
        held: file descriptors of locks. The locks stay until the command has ended, even if this process is
            killed.

    Raises:
        CapasError: the command failed; the message has its last lines.
    """
    with (
        log.open("w", encoding="utf-8") as out,
        _guarded(command, work, env, out, held) as child,
        log.open(encoding="utf-8", errors="replace") as written,
    ):
        rest, ended = "", False
        while not ended:
            ended = child.poll() is not None  # all its output can be read then
            *lines, rest = re.split(r"[\r\n]+", rest + written.read())
            yield from (line.strip() for line in lines)
            if not ended:
                look()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        if child.returncode:
            raise CapasError(_why(log))


@contextmanager
def _guarded(
    command: list[str], work: Path, env: dict[str, str], out: Any, held: Sequence[int]
) -> "Iterator[subprocess.Popen[bytes]]":
    """Start the command under `capas.core.guard`, and end it with the block."""
    guard = [sys.executable, "-m", "capas.core.guard", *command]
    child = subprocess.Popen(
        guard,
        cwd=work,
        env=env,
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=subprocess.STDOUT,
        pass_fds=held,
    )
    assert child.stdin is not None
    try:
        yield child
    finally:
        child.stdin.close()
        child.wait()


def _why(log: Path) -> str:
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))
    nonblank = [line for line in lines if line.strip()]
    return "\n".join(
        ["the pipeline failed; the last lines of its log:", *nonblank[-_NUM_LAST:], f"log: {log}"]
    )
