"""Run `python SCRIPT ...` as a fork of the process that holds the libraries, or plainly if it cannot.

`python -IS library_client.py FOLDER SCRIPTS ARGUMENT ...` stands in for `python ARGUMENT ...`. FOLDER has the
socket of `library_server.py`; SCRIPTS are the names of the scripts that need the libraries, joined by commas.
It imports little, because it starts before each stage.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_SOCKET = "socket"
_MAX_ANSWER = 64


def main(folder: str, scripts: list[str], arguments: list[str]) -> None:
    needs = arguments and Path(arguments[0]).name in scripts
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    received: list[int] = []  # signals that come before the stage has begun
    if needs:
        _handle(lambda number, frame: received.append(number))
    if not needs or not (stage := _asked(connection, folder, arguments)):
        for number in received:
            _end_by(number)
        os.execv(sys.executable, [sys.executable, *arguments])
    code = _followed(connection, stage, received)
    if code < 0:
        _end_by(-code)
    sys.exit(code)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _end_by(number: int) -> None:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _asked(connection: socket.socket, folder: str, arguments: list[str]) -> int:
    """Ask for a stage; return its process, or 0 if nobody answers or the question is too long."""
    here = Path.cwd()
    request = {"arguments": arguments, "folder": str(here), "environment": dict(os.environ)}
    try:
        os.chdir(folder)  # the path of a socket is limited to 108 bytes
        connection.connect(_SOCKET)
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        return int(connection.recv(_MAX_ANSWER) or 0)
    except OSError:
        return 0
    finally:
        os.chdir(here)


def _followed(connection: socket.socket, stage: int, received: list[int]) -> int:
    """Pass on signals until the stage has ended; return its exit code, or minus the number of a signal."""

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(stage, number)

    _handle(pass_on)
    for number in received:
        pass_on(number)
    code = connection.recv(_MAX_ANSWER)
    return int(code) if code else -signal.SIGKILL


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), sys.argv[3:])
