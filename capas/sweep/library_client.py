"""Run `python SCRIPT ...` as a fork of the process that holds the libraries, or plainly if it cannot.

`python -IS library_client.py FOLDER SCRIPTS ARGUMENT ...` stands in for `python ARGUMENT ...`. FOLDER has the
socket of `library_server.py`; SCRIPTS are the names of the scripts that need the libraries, joined by commas.
It imports little, because it starts before each stage.
"""

import array
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

_SOCKET = "socket"
_MAX_ANSWER = 64
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(folder: str, scripts: list[str], arguments: list[str]) -> None:
    needs = arguments and Path(arguments[0]).name in scripts
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not needs or not (child := _asked(connection, folder, arguments)):
        os.execv(sys.executable, [sys.executable, *arguments])
    code = _followed(connection, child)
    if code < 0:  # ended by a signal, and so does this process
        if -code in _PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _asked(connection: socket.socket, folder: str, arguments: list[str]) -> int:
    """Ask for a stage; return its process, or 0 if nobody answers or the question is too long."""
    here = Path.cwd()
    request = {"arguments": arguments, "folder": str(here), "environment": dict(os.environ)}
    streams = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
    try:
        os.chdir(folder)  # the path of a socket is limited to 108 bytes
        connection.connect(_SOCKET)
        connection.sendmsg([json.dumps(request).encode()], [streams])
        return int(connection.recv(_MAX_ANSWER) or 0)
    except OSError:
        return 0
    finally:
        os.chdir(here)


def _followed(connection: socket.socket, child: int) -> int:
    """Pass on signals until the stage has ended; return its exit code, or minus the number of a signal."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.killpg(child, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    code = connection.recv(_MAX_ANSWER)
    return int(code) if code else -signal.SIGKILL


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), sys.argv[3:])
