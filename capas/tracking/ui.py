"""Serve the MLflow UI and print the addresses of its training pages.

    capas ui                  serve this repository's store at http://127.0.0.1:5000
    capas ui --port 5001      on another port

The table of runs opens with the columns worth comparing. Use the printed addresses: others open MLflow's view
for traces of GenAI applications. If MLFLOW_TRACKING_URI names a server, only that server's addresses are
printed.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

from capas.core.dag import read_yaml
from capas.core.errors import CapasError

HOST, PORT = "127.0.0.1", 5000
VIEW, VIEW_TAG = "capas", "mlflow.sharedViewState."
_TRAININGS = "workflowType=machine_learning"
DEFAULT_PARAMS = ("trainer.learning_rate", "lora.r")
_METRICS = ("score", "base_score", "tuned.loss")


def shared_view(params: Sequence[str], metrics: Sequence[str], search: str = "") -> str:
    """Return a view of the runs for `VIEW_TAG`: the table's columns, and charts that compare runs.

    Args:
        params, metrics: names of the axes of the parallel coordinates; the first metric has a bar chart.
        search: MLflow's filter; in an address it would undo the order of the view.
    """
    common = {"runsCountToCompare": 100, "metricSectionId": "compared"}
    own = {"deleted": False, "isGenerated": False}
    charts: list[dict[str, Any]] = [
        {
            **{"type": "PARALLEL", "uuid": "parallel", "showAllRuns": True},
            **{"selectedParams": list(params), "selectedMetrics": list(metrics)},
        },
        *(_chart("BAR", name) for name in metrics[:1]),
        *(_chart("LINE", name) for name in ("train/loss", "validation/loss")),
    ]
    section = {"uuid": "compared", "name": "compared", "display": True, "isReordered": True}
    columns = [f"metrics.`{name}`" for name in _METRICS]
    columns += [f"params.`{name}`" for name in (*params, "dataset.preset")]
    columns += ["attributes.`Duration`", "attributes.`Created`"]
    return json.dumps(
        {
            "selectedColumns": columns,
            "columnOrder": columns,  # otherwise Dataset and Duration push metrics off the screen
            # If ordered by date, MLflow would fold the trials of a sweep below its run.
            "orderByKey": f"metrics.`{_METRICS[0]}`",
            "orderByAsc": False,
            "searchFilter": search,
            "compareRunCharts": [{**chart, **common, **own} for chart in charts],
            "compareRunSections": [{**section, **own}],
            "isAccordionReordered": True,
        }
    )


def _chart(kind: str, metric: str) -> dict[str, Any]:
    return {"type": kind, "uuid": f"{kind}-{metric}", "metricKey": metric, "displayName": metric}


def default_view() -> str:
    """Return the view that every experiment of capas has."""
    return shared_view(DEFAULT_PARAMS, ("score", "tuned.loss"))


class Pages:
    """The addresses of an experiment's pages.

    Args:
        uri: the tracking URI; the pages of a database are those that `capas ui` serves.
    """

    def __init__(self, uri: str, experiment_id: str, port: int = PORT) -> None:
        self.is_server = uri.startswith(("http://", "https://"))
        self._base = _without_user(uri) if self.is_server else f"http://{HOST}:{port}"
        self._id = experiment_id

    def runs(self, view: str = VIEW, charts: bool = False) -> str:
        """Return the table of runs, or their charts, in a shared view."""
        words = [f"viewStateShareKey={view}", *(["compareRunsMode=CHART"] if charts else [])]
        return self._page(f"experiments/{self._id}/runs", *words)

    def run(self, run_id: str) -> str:
        return self._page(f"experiments/{self._id}/runs/{run_id}")

    def comparison(self, run_ids: Iterable[str]) -> str:
        """Return the page that compares runs; it opens with the parameters that differ."""
        runs = json.dumps(list(run_ids), separators=(",", ":"))
        return self._page(
            "compare-runs", f"runs={quote(runs)}", f"experiments={quote(json.dumps([self._id]))}"
        )

    def _page(self, path: str, *words: str) -> str:
        return f"{self._base}/#/{path}?{'&'.join([*words, _TRAININGS])}"

    def hint(self) -> str:
        """Return a note on what must run before an address answers, to be put after it."""
        return "" if self.is_server else "   (served by `make ui`)"


def _without_user(uri: str) -> str:
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=PORT, help=f"(default: {PORT})")


def command(options: argparse.Namespace) -> int:
    """Print the addresses, then become MLflow's server until it is stopped.

    Raises:
        CapasError: the port is invalid or in use, or the store cannot be reached.
    """
    from capas.tracking.client import reachable
    from capas.tracking.store import Store, tracking_uri

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
    pages = Pages(uri, store.experiment_id, options.port)
    lines = [f"runs     {pages.runs()}", f"charts   {pages.runs(charts=True)}"]
    lines += [f"newest   {pages.run(run.id)}" for run in newest]
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
