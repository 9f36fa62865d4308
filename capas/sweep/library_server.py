"""Import libraries once for all trials of a worker; the stages that need them are forks of this process.

Run as a script, so that no module of capas is loaded here: a stage has the code of its own workspace.
`python library_server.py FOLDER LIBRARY ...` listens at FOLDER/socket, and prints a line when it does. On
SIGINT it ends and removes the folder; stages that run go on, since others watch over them.

    server ── a waiter for each stage ── the stage, in a process group of its own
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

_SOCKET = "socket"
_MAX_REQUEST = 2**20  # bytes: a command line and an environment
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main(folder: str, libraries: list[str]) -> None:
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of this script, whose modules are no libraries
    signal.signal(signal.SIGINT, lambda number, frame: _end(folder))
    listening = _listen(folder)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads more
    run_script(_serve(listening, libraries))


def _end(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _listen(folder: str) -> socket.socket:
    """Return the socket; its path is limited to 108 bytes, a name in the current folder is not."""
    here = Path.cwd()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.chdir(folder)
    listening.bind(_SOCKET)
    os.chdir(here)
    listening.listen()
    return listening


def _serve(listening: socket.socket, libraries: list[str]) -> Path:
    """Fork for each connection; return in the process that is to run a stage, with its script.

    The libraries are imported for the first one: a trial whose stages are cached needs none.
    """
    while True:
        connection, _ = listening.accept()
        _reap()
        for library in libraries:
            importlib.import_module(library)
        gc.freeze()  # a collection in a stage would copy all memory that it shares with this process
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        listening.close()
        if (script := _started(connection)) is not None:
            return script


def _reap() -> None:
    """Forget waiters that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _started(connection: socket.socket) -> Path | None:
    """Return the script in a new process; this one waits for its end, and tells the other end of it."""
    os.setpgid(0, 0)  # or what ends the server would end this, and with it the stage
    request, descriptors = _receive(connection)
    waiter = os.getpid()
    if not (stage := os.fork()):
        connection.close()
        return _become(request, descriptors, waiter)
    with contextlib.suppress(OSError):  # the stage may have done it
        os.setpgid(stage, stage)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(OSError):  # the other end was killed
        connection.send(str(stage).encode())
    threading.Thread(target=_end_with_client, args=(connection, stage), daemon=True).start()
    status = os.waitpid(stage, 0)[1]
    with contextlib.suppress(OSError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    content, descriptors, _, _ = socket.recv_fds(connection, _MAX_REQUEST, 3)
    if not content:
        os._exit(0)  # the other end was killed before it sent anything
    return json.loads(content), descriptors


def _end_with_client(connection: socket.socket, stage: int) -> None:
    with contextlib.suppress(OSError):
        connection.recv(1)  # it sends nothing more, so this returns when it has ended
    with contextlib.suppress(ProcessLookupError):
        os.killpg(stage, signal.SIGKILL)


def _become(request: dict[str, Any], descriptors: list[int], waiter: int) -> Path:
    """Make this process what `python SCRIPT ...` would be in the folder and environment of the request."""
    with contextlib.suppress(OSError):  # the waiter may have done it
        os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != waiter:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].ORIGINAL_DIR = request["folder"]  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    script = Path.cwd() / sys.argv[0]
    first = [] if sys.flags.safe_path else [str(script.resolve().parent)]
    added = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [*first, *added, *sys.path]
    return script


def run_script(script: Path) -> None:
    """Run a script as `__main__`, as the interpreter does."""
    module = ModuleType("__main__")
    module.__file__ = str(script)
    sys.modules["__main__"] = module
    exec(compile(script.read_bytes(), str(script), "exec"), module.__dict__)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
