"""Run a command that ends when its starter ends: `python -m capas.core.guard COMMAND ...`.

Standard input is a pipe that is never written to. It closes when the starter has ended, even by SIGKILL. The
command and all its child processes then get SIGINT, and after ten seconds SIGKILL.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

_SECONDS_TO_END = 10.0


def run(command: list[str], stdin: int) -> int:
    """Run the command and return its exit code; end it when the pipe `stdin` closes."""
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
    # A signal to the whole group also reaches the starter, which decides: ending here would leave the command
    # running. SIG_IGN is not used, because the command would inherit it and SIGINT could not end it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    sys.exit(run(sys.argv[1:], sys.stdin.fileno()))
