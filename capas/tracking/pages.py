"""The addresses of MLflow's pages for an experiment, and the view in which its runs open."""

import json
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

VIEW, VIEW_TAG = "capas", "mlflow.sharedViewState."
DEFAULT_PARAMS = ("trainer.learning_rate", "lora.r")
LOSSES = ("train/loss", "validation/loss")  # the curves of a training
_METRICS = ("score", "base_score", "tuned.loss")
_TIMES = ("attributes.`Duration`", "attributes.`Created`")
_TRAININGS = "workflowType=machine_learning"
HOST, PORT = "127.0.0.1", 5000


def shared_view(
    params: Sequence[str],
    metrics: Sequence[str],
    search: str = "",
    columns: Sequence[str] = (),
    ascending: bool = False,
) -> str:
    """Return a view of the runs for `VIEW_TAG`: the table's columns, and charts that compare runs.

    Args:
        params, metrics: names of the axes of the parallel coordinates; the first metric has a bar chart.
        search: MLflow's filter; in an address it would undo the order of the view.
        columns: the columns from `columns_of`, the first of which orders the runs; none: one for each axis.
        ascending: whether the run with the lowest value comes first.
    """
    common = {"runsCountToCompare": 100, "metricSectionId": "compared"}
    own = {"deleted": False, "isGenerated": False}
    charts: list[dict[str, Any]] = [
        {
            **{"type": "PARALLEL", "uuid": "parallel", "showAllRuns": True},
            **{"selectedParams": list(params), "selectedMetrics": list(metrics)},
        },
        *(_chart("BAR", name) for name in metrics[:1]),
        *(_chart("LINE", name) for name in LOSSES),
    ]
    section = {"uuid": "compared", "name": "compared", "display": True, "isReordered": True}
    columns = [*(columns or columns_of(params, metrics)), *_TIMES]
    return json.dumps(
        {
            "selectedColumns": columns,
            "columnOrder": columns,  # otherwise Dataset and Duration push metrics off the screen
            # If ordered by date, MLflow would fold the trials of a sweep below its run.
            "orderByKey": columns[0],
            "orderByAsc": ascending,
            "searchFilter": search,
            "compareRunCharts": [{**chart, **common, **own} for chart in charts],
            "compareRunSections": [{**section, **own}],
            "isAccordionReordered": True,
        }
    )


def _chart(kind: str, metric: str) -> dict[str, Any]:
    return {"type": kind, "uuid": f"{kind}-{metric}", "metricKey": metric, "displayName": metric}


def columns_of(params: Iterable[str], metrics: Iterable[str]) -> list[str]:
    """Return the columns of the table for metrics and params."""
    return [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{name}`" for name in params)]


def default_view() -> str:
    """Return the view that every experiment of capas has."""
    columns = columns_of((*DEFAULT_PARAMS, "dataset.preset"), _METRICS)
    return shared_view(DEFAULT_PARAMS, ("score", "tuned.loss"), columns=columns)


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
        """Return the table of runs, or their charts, in a shared view.

        Without a view, "", MLflow folds the children of a run below it.
        """
        words = [f"viewStateShareKey={view}"] if view else []
        words += ["compareRunsMode=CHART"] if charts else []
        return self._page(f"experiments/{self._id}/runs", *words)

    def run(self, run_id: str) -> str:
        return self._page(f"experiments/{self._id}/runs/{run_id}")

    def run_link(self, run_id: str) -> str:
        """Return the link to a run for a note in MLflow, where it holds on any port and server."""
        return self.run(run_id).removeprefix(f"{self._base}/")

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
