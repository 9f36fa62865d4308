"""Runs a command that ends with whoever started it: `python -m capas.core.guard COMMAND ...`.

Standard input is a pipe that is never written to. It closes when the starter is gone, even by SIGKILL;
then the command and all that it started get SIGINT, and after a while SIGKILL.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

_SECONDS_TO_END = 10.0


def run(command: list[str], stdin: int) -> int:
    """The command's exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_starter, args=(child, stdin), daemon=True).start()
    return child.wait()


def _end_with_starter(child: "subprocess.Popen[bytes]", stdin: int) -> None:
    while os.read(stdin, 1):
        pass
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_SECONDS_TO_END)


if __name__ == "__main__":
    # A signal to the whole group reaches the starter, too, and the starter decides: who died here would leave
    # the command behind. Not SIG_IGN: the command would inherit it, and SIGINT could not end it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    sys.exit(run(sys.argv[1:], sys.stdin.fileno()))
