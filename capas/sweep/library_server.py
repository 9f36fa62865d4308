"""Import libraries once for all trials of a worker; the stages that need them are forks of this process.

Run as a script, so that no module of capas is loaded here: a stage has the code of its own workspace.
`python library_server.py FOLDER LIBRARY ...` listens at FOLDER/socket, and prints a line when it does.
"""

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_SOCKET = "socket"
_MAX_REQUEST = 2**20  # bytes: a command line and an environment
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main(folder: str, libraries: list[str]) -> None:
    del sys.path[0]  # the folder of this script, whose modules are no libraries
    os.chdir(folder)  # the path of a socket is limited to 108 bytes
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process without a traceback
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(_SOCKET)
        listening.listen()
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads more
        signal.signal(signal.SIGCHLD, _reap)
        script = _serve(listening, libraries)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(script, run_name="__main__")


def _reap(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve(listening: socket.socket, libraries: list[str]) -> str:
    """Fork for each connection; return in the process that is to run a stage, with its script.

    The libraries are imported for the first one: a trial whose stages are cached needs none.
    """
    while True:
        connection, _ = listening.accept()
        for library in libraries:
            importlib.import_module(library)
        gc.freeze()  # a collection in a stage would copy all memory that it shares with this process
        if os.fork():
            connection.close()
        elif script := _started(connection):
            return script


def _started(connection: socket.socket) -> str:
    """Return the script in a new process; this one waits for its end, and tells the other end of it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, descriptors = _receive(connection)
    if not (child := os.fork()):
        connection.close()
        return _become(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.send(str(child).encode())
    threading.Thread(target=_end_with_client, args=(connection, child), daemon=True).start()
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(OSError):  # the other end was killed
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    descriptors = array.array("i")
    content, extra, _, _ = connection.recvmsg(
        _MAX_REQUEST, socket.CMSG_LEN(descriptors.itemsize * 3)
    )
    for _, _, received in extra:
        descriptors.frombytes(received)
    if not content:
        os._exit(0)  # the other end was killed before it sent anything
    return json.loads(content), list(descriptors)


def _end_with_client(connection: socket.socket, child: int) -> None:
    with contextlib.suppress(OSError):
        connection.recv(1)  # it sends nothing more, so this returns when it has ended
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _become(request: dict[str, Any], descriptors: list[int]) -> str:
    """Make this process what `python SCRIPT ...` would be in the folder and environment of the request."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    script = Path(sys.argv[0]).resolve()
    added = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [str(script.parent), *added, *sys.path]
    return sys.argv[0]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
