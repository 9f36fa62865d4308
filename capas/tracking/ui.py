"""Serve the MLflow UI and print the addresses of its training pages.

    capas ui                  serve this repository's store at http://127.0.0.1:5000
    capas ui --port 5001      on another port

The table of runs opens with the columns worth comparing. Use the printed addresses: others open MLflow's view
for traces of GenAI applications. If MLFLOW_TRACKING_URI names a server, only that server's addresses are
printed.
"""

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from capas.core.dag import read_yaml
from capas.core.errors import CapasError
from capas.tracking.client import reachable
from capas.tracking.pages import HOST, PORT, Pages
from capas.tracking.store import Store, sweeps_of, tracking_uri


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=PORT, help=f"(default: {PORT})")


def command(options: argparse.Namespace) -> int:
    """Print the addresses, then become MLflow's server until it is stopped.

    Raises:
        CapasError: the port is invalid or in use, or the store cannot be reached.
    """

    root = Path.cwd()
    uri, name = tracking_uri(root), read_yaml(root / "params.yaml")["tracking"]["experiment_name"]
    if not 0 < options.port < 2**16:
        raise CapasError(f"--port {options.port}: expected a number from 1 to 65535")
    is_server = Pages(uri, "").is_server
    if not is_server:
        _check_free(options.port)
    with reachable(uri):
        store = Store.open(root, name)
        newest = store.client.search_runs(
            [store.experiment_id], order_by=["attributes.start_time DESC"], limit=1
        )
        sweeps = store.client.get_experiment_by_name(sweeps_of(name))
    pages = Pages(uri, store.experiment_id, options.port)
    lines = [f"runs     {pages.runs()}", f"charts   {pages.runs(charts=True)}"]
    lines += [f"newest   {pages.run(run.id)}" for run in newest]
    if sweeps is not None:
        of_sweeps = Pages(uri, sweeps.experiment_id, options.port)
        lines.append(f"sweeps   {of_sweeps.runs(view='')}")
    if not newest:
        lines.append(
            "No run yet. `dvc repro` publishes the first one to "
            f"{'this server' if is_server else uri}."
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if is_server:
        return 0
    sys.stdout.write("Ctrl-C stops the server.\n")
    sys.stdout.flush()
    return _serve(uri, options.port)


def _serve(uri: str, port: int) -> NoReturn:
    """Become MLflow's server.

    The URI may hold a password, so it is passed in the environment: every user could list an argument.
    """
    place = ["--host", HOST, "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", "ui", *place], environment)


def _check_free(port: int) -> None:
    """Check that the port is free.

    Raises:
        CapasError: another process listens on it.
    """
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        raise CapasError(
            f"port {port} is in use. Choose another: make ui PORT={port + 1}, or capas ui --port {port + 1}"
        ) from None
