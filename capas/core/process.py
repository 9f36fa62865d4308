"""A command whose lines are followed while it runs, and which ends with the process that follows it."""

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
_NUM_LAST = 12  # lines of its log that are shown where it fails


def follow(
    command: list[str],
    work: Path,
    env: dict[str, str],
    log: Path,
    look: Callable[[], None],
    held: Sequence[int] = (),
) -> Iterator[str]:
    """Run it in the folder `work`; its lines as they come, which go to `log` as well.

    The locks whose file descriptors are in `held` stay until the command has ended, even where this process
    is killed before.

    Raises:
        CapasError: it failed; with its last lines.
    """
    with (
        log.open("w", encoding="utf-8") as out,
        _guarded(command, work, env, out, held) as child,
        log.open(encoding="utf-8", errors="replace") as written,
    ):
        rest, ended = "", False
        while not ended:
            ended = child.poll() is not None  # then all that it wrote is there to read
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
    """See `capas.core.guard`."""
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
    said = [line for line in lines if line.strip()]
    return "\n".join(
        ["the pipeline failed; the last lines of its log:", *said[-_NUM_LAST:], f"log: {log}"]
    )
