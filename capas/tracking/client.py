"""Wrap MLflow's client: runs as plain values, and errors that say what to do.

No other module of this folder imports mlflow. It is imported inside functions, because the import alone takes
seconds.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from capas.core.errors import CapasError, without_secrets
from capas.tracking.artifacts import refusal

RETRY = "Once it is reachable, retry with the same command or dvc repro publish"
_SETTINGS = {  # defaults that the user's own settings override
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default, 7, tries for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_MAX_METRICS, _MAX_OTHERS = 1000, 100  # in one call, limits of MLflow
_MAX_RUNS = 1000  # on a page
_OF_ARTIFACTS = ("log_text", "load_table", "log_table")  # calls about artifacts without that word


@dataclass(frozen=True)
class Run:
    """A run as it was when it was read; times in milliseconds since 1970."""

    id: str
    name: str
    status: str
    experiment_id: str
    artifact_uri: str
    start_time: int
    end_time: int | None
    is_deleted: bool
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]

    @classmethod
    def of(cls, found: Any) -> "Run":
        """Return MLflow's own `Run` as a plain value."""
        info, data = found.info, found.data
        return cls(
            id=info.run_id,
            name=info.run_name,
            status=info.status,
            experiment_id=info.experiment_id,
            artifact_uri=info.artifact_uri,
            start_time=info.start_time,
            end_time=info.end_time,
            is_deleted=info.lifecycle_stage == "deleted",
            tags=dict(data.tags),
            params=dict(data.params),
            metrics=dict(data.metrics),
        )

    @property
    def is_empty(self) -> bool:
        """Return whether nothing was logged to the run."""
        return not self.metrics and not self.params


class Point(NamedTuple):
    """A single value of a curve."""

    name: str
    step: int
    value: float


class Split(NamedTuple):
    """A split of the data as MLflow shows it beside a run."""

    name: str
    digest: str
    num_rows: int
    num_tokens: int


class Client:
    """MLflow's client, with runs as `Run`.

    Errors of artifact stores, of any class, become CapasError. Errors of MLflow itself, requests and
    SQLAlchemy pass through: see `reachable`. Calls that have no method here go to `MlflowClient` as they are.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return self._guarded(name, found) if callable(found) else found

    def get_run(self, run_id: str) -> Run:
        """Return a run."""
        return Run.of(self._client.get_run(run_id))

    def create_run(
        self,
        experiment_id: str,
        start_time: int | None = None,
        tags: Mapping[str, str] | None = None,
        run_name: str | None = None,
    ) -> Run:
        """Create a run; `start_time` in milliseconds since 1970, None: now."""
        made = self._client.create_run(experiment_id, start_time, dict(tags or {}), run_name)
        return Run.of(made)

    def search_runs(
        self,
        experiments: Sequence[str],
        query: str = "",
        order_by: Sequence[str] = (),
        limit: int | None = None,
    ) -> list[Run]:
        """Return the runs of experiments, all of them or the first `limit` ones."""
        found: list[Run] = []
        token, order = None, list(order_by) or None
        while experiments:
            size = min(limit or _MAX_RUNS, _MAX_RUNS)
            page = self._client.search_runs(
                list(experiments), query, max_results=size, order_by=order, page_token=token
            )
            found += map(Run.of, page)
            token = page.token
            if not token or (limit is not None and len(found) >= limit):
                break
        return found[:limit]

    def send_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Set params, in atomic batches; MLflow refuses to change one."""
        from mlflow.entities import Param

        for part in _parts([Param(key, value) for key, value in params.items()], _MAX_OTHERS):
            self._client.log_batch(run_id, params=part)

    def send_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, in atomic batches."""
        from mlflow.entities import RunTag

        for part in _parts([RunTag(name, value) for name, value in tags.items()], _MAX_OTHERS):
            self._client.log_batch(run_id, tags=part)

    def send_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Log values of curves, in batches."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        for part in _parts([Metric(p.name, p.value, now, p.step) for p in points], _MAX_METRICS):
            self._client.log_batch(run_id, metrics=part)

    def send_splits(self, run_id: str, splits: Sequence[Split]) -> None:
        """Log the splits that the model saw."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for split in splits:
            folder = f"data/formatted/{split.name}"
            source = json.dumps({"uri": f"{folder}.parquet"})
            profile = json.dumps({"num_rows": split.num_rows, "num_tokens": split.num_tokens})
            dataset = Dataset(folder, split.digest, "local", source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split.name)]))
        self._client.log_inputs(run_id, datasets=inputs)

    def send_table(self, run_id: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a table as `MlflowClient.log_table` does, which would append to an earlier publish's."""
        import pandas as pd
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        table = pd.DataFrame(list(rows)).to_json(orient="split", index=False)
        self.log_text(run_id, table, name)
        tables = json.loads(self.get_run(run_id).tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if (entry := {"path": name, "type": "table"}) not in tables:
            self._client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, entry]))

    def read_artifact(self, run_id: str, name: str, called: str) -> bytes:
        """Return the content of a file of a run.

        Args:
            called: the run, for the message.

        Raises:
            CapasError: it cannot be read.
        """
        from mlflow.exceptions import MlflowException

        with TemporaryDirectory(prefix="capas-") as folder:
            try:
                return Path(self.download_artifacts(run_id, name, folder)).read_bytes()
            except (OSError, MlflowException) as error:
                raise CapasError(
                    f"the artifact {name} of {called} cannot be read: {error}"
                ) from None

    def _guarded(self, name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            own: tuple[type[Exception], ...] = (*_own_errors(), CapasError)
            try:
                return found(*args, **kwargs)
            except own:
                raise
            except Exception as error:
                if "artifact" not in name and name not in _OF_ARTIFACTS:
                    raise
                run = self._client.get_run(args[0] if args else kwargs["run_id"])
                raise refusal(error, run.info.artifact_uri) from error

        return call


def connect(uri: str) -> Client:
    """Return a client of the tracking server or database at `uri`."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return Client(MlflowClient(tracking_uri=uri))


def list_artifacts(location: str, uri: str) -> None:
    """List an artifact store; it raises whatever its client library raises.

    Args:
        location: `artifact_location` of an experiment, e.g. s3://bucket/1.
        uri: the tracking server or database.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(location, tracking_uri=uri).list_artifacts(None)


def start_system_metrics(run_id: str, uri: str, seconds: float) -> Any:
    """Log CPU, memory, disk, network and GPU of this machine as system/... metrics every few seconds.

    Returns:
        The monitor, to be ended by its method `finish`. What drivers raise passes through.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=uri
    )
    monitor.start()
    return monitor


@contextmanager
def reachable(uri: str) -> Iterator[None]:
    """Turn MLflow's own errors into one that says what to do.

    Raises:
        CapasError: a call in the block failed.
    """
    own = _own_errors()
    try:
        yield
    except own as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
        raise CapasError(
            f"MLflow at {without_secrets(uri)} cannot be used: {without_secrets(reason)}\n{RETRY}"
        ) from error


def _own_errors() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError


def _parts(values: list[Any], size: int) -> Iterator[list[Any]]:
    yield from (values[start : start + size] for start in range(0, len(values), size))
