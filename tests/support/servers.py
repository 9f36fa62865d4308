"""MLflow servers on the loopback that can be killed, a PostgreSQL cluster, and a slow way to a server."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

STARTS_WITHIN = 120.0  # seconds; the tables of a new database take most of them


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Server:
    """`mlflow server`, its artifacts behind it; started again it has the same address."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store, self.port = folder, store, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env={**env, "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + STARTS_WITHIN
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the server and its workers, at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=30)
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def postgres() -> Iterator[str]:
    """The URI of a database in a cluster of its own, which goes with the block."""
    found = shutil.which("initdb") or next(
        iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None
    )
    if found is None:
        pytest.skip("PostgreSQL is not installed: apt install postgresql")
    programs, port = Path(found).resolve().parent, str(free_port())
    folder = Path(tempfile.mkdtemp(prefix="capas-postgres-"))
    who = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        who = {"user": "postgres", "group": "postgres", "extra_groups": []}

    def call(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(programs / program), *arguments],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False, **who,
        )  # fmt: skip
        assert done.returncode == 0, (folder / "log").read_text()

    with (folder / "log").open("ab") as log:
        data = str(folder / "data")
        call("initdb", "-D", data, "-U", "capas", "-A", "trust", "-N")
        settings = f"-p {port} -k {folder} -h 127.0.0.1 -c fsync=off"
        call("pg_ctl", "-D", data, "-w", "-l", str(folder / "data/log"), "-o", settings, "start")
        try:
            call("createdb", "-h", "127.0.0.1", "-p", port, "-U", "capas", "mlflow")
            yield f"postgresql+psycopg2://capas@127.0.0.1:{port}/mlflow"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
            shutil.rmtree(folder)


class Proxy:
    """A way to a server that takes its time.

    `delay` is waited before every piece of a request is passed on. The answer to a request that has
    `swallow` in it never comes, as often as `swallow_times` says; the request itself arrives.
    """

    def __init__(self, port: int) -> None:
        self.delay, self.swallow, self.swallow_times = 0.0, b"", 0
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        address = ("127.0.0.1", self._target)
        with client, suppress(OSError), socket.create_connection(address) as server:
            silent = threading.Event()
            both = (server, client, silent)
            threading.Thread(target=self._answer, args=both, daemon=True).start()
            while piece := client.recv(65536):
                time.sleep(self.delay)
                if self.swallow and self.swallow in piece and self.swallow_times > 0:
                    self.swallow_times -= 1
                    silent.set()
                server.sendall(piece)

    @staticmethod
    def _answer(server: socket.socket, client: socket.socket, silent: threading.Event) -> None:
        with suppress(OSError):
            while piece := server.recv(65536):
                if not silent.is_set():
                    client.sendall(piece)
            client.shutdown(socket.SHUT_RDWR)
