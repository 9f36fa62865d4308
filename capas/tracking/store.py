"""Open the MLflow store: its address, one run for each distinct training, points logged once.

A run is found by its tag `train_key`, so no run id is ever written to an output of DVC. Stores are opened
only in this module. mlflow is always imported inside functions, because the import alone takes seconds.
"""

import importlib.util
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from capas.core.errors import CapasError, without_secrets
from capas.core.locks import BusyError, exclusive, is_held
from capas.tracking import pages
from capas.tracking.artifacts import UnusableStoreError, check_artifacts
from capas.tracking.client import RETRY, Client, Point, Run, connect, list_artifacts, reachable

TRAIN_KEY, GATE = "train_key", "gate"  # tags of a run
# also a tag: `run_content.artifacts_digest` of the published outputs
ARTIFACTS = "capas.artifacts"
USER, EXPERIMENT = "mlflow.user", "dvc.experiment"
MODEL = "model"  # the folder in a run's artifacts that MLflow loads
HOME = "CAPAS_HOME"  # set by a sweep; DVC sets DVC_ROOT if it works in another folder itself
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens its training view
_CONNECT_SECONDS = 5.0
_RELATIVE = re.compile(  # sqlite:///FILE, file:FOLDER or FOLDER, but not the names of services
    r"(?P<kind>sqlite(\+\w+)?:///(?!file:)|file:|(?!databricks|uc$)(?![\w+.-]+:))(?P<path>[^/:].*)"
)
_SQLITE = re.compile(r"sqlite(\+\w+)?:///(?!file:)(?P<path>[^?]+)")
# For sqlite:///PATH MLflow makes a folder named PATH, without unquoting it; for other forms it makes none.
_UNREAD = {"sqlite:///": "sqlite+pysqlite:///", "": "file://"}
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_DRIVERS = {  # module that SQLAlchemy imports -> package that contains it
    "psycopg2": "psycopg2-binary",
    "psycopg": "'psycopg[binary]'",
    "MySQLdb": "mysqlclient",
    "mysql": "mysql-connector-python",
}


def home(root: Path) -> Path:
    """Return the user's repository: queued experiments and trials of a sweep run in other folders."""
    return Path(os.environ.get(HOME) or os.environ.get("DVC_ROOT") or root).resolve()


def tracking_uri(root: Path) -> str:
    """Return the address of the store, with relative paths resolved in the user's repository.

    A store in a trial's folder would be deleted with that folder. The repository's own folder is quoted as a
    URL requires: its name may have a ?, a # or a %.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    relative = _RELATIVE.fullmatch(uri)
    if relative is None:
        return uri
    kind, here = relative["kind"], home(root)
    quoted = Path(quote(str(here)))
    if quoted == here:
        return f"{kind}{here / relative['path']}"
    return f"{_UNREAD.get(kind, kind)}{quoted / relative['path']}"


def sqlite_uri(file: Path) -> str:
    """Return the address of the SQLite database in `file`."""
    quoted = quote(str(file.resolve()))
    return f"{'sqlite:///' if Path(quoted) == file.resolve() else _UNREAD['sqlite:///']}{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite database, or None if `uri` names something else."""
    found = _SQLITE.match(uri)
    return Path(unquote(found["path"])) if found and found["path"] != ":memory:" else None


def sweeps_of(experiment_name: str) -> str:
    """Return the name of the MLflow experiment with the sweeps of the trainings in another one.

    A sweep has a run for each of its trials, which would double its training runs in their table.
    """
    return f"{experiment_name}-sweeps"


def lock_file(root: Path, name: str) -> Path:
    """Return the lock file that a process holds while it writes to a run in MLflow."""
    return home(root) / ".dvc/tmp" / f"mlflow-{name}.lock"


@contextmanager
def locked(root: Path, name: str, seconds: float) -> Iterator[None]:
    """Allow one process at a time in this block, on this machine.

    Raises:
        CapasError: another process holds the lock for longer than `seconds`.
    """
    file = lock_file(root, name)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(file, seconds))
        except BusyError:
            raise CapasError(
                f"another process is writing to the same MLflow run ({file.name}). {RETRY}"
            ) from None
        yield


class Store:
    """An open MLflow experiment. Under the lock of a run no other process writes to it: see `locked`."""

    def __init__(self, client: Client, experiment_id: str, root: Path) -> None:
        self.client, self.experiment_id, self.root = client, experiment_id, root
        self._steps: dict[tuple[str, str], set[int]] = {}  # (run id, curve) -> steps already logged

    @classmethod
    def open(cls, root: Path, experiment_name: str) -> "Store":
        """Open the store, and create what is missing: the database, its tables, the experiment.

        Raises:
            CapasError: the server or the database cannot be reached, or the experiment was deleted.
        """
        uri = tracking_uri(root)
        _check_uri(uri)
        # Two processes that create the tables at the same time would break each other's work.
        with reachable(uri), locked(root, "store", seconds=60):
            client = connect(uri)
            return cls(client, _experiment_id(client, experiment_name, uri, root), root)

    def check_artifacts(self) -> None:
        """Check that the experiment's artifacts can be written from here.

        Raises:
            CapasError: they cannot; see `artifacts.check_artifacts`.
        """
        location = self.client.get_experiment(self.experiment_id).artifact_location
        check_artifacts(location, tracking_uri(self.root), list_artifacts)

    def find(self, train_key: str) -> Run | None:
        """Return the run of this training; among several, the oldest that is not empty."""
        return next(iter(self._all(TRAIN_KEY, train_key)), None)

    def find_or_create(
        self, train_key: str, name: Callable[[], str], started: int | None = None
    ) -> Run:
        """Return the run of this training; call it while holding the training's lock.

        Under the lock no other process works on the run, so a run with the status RUNNING is set to FAILED.
        So are the runs of other trainings whose process on this machine has gone.

        Args:
            name: returns the name for a new run.
            started: when its training began, in milliseconds since 1970; None: now.
        """
        self.end_abandoned(TRAIN_KEY, partial(lock_file, self.root))
        run = self.only(TRAIN_KEY, train_key, name, started=started)
        if run.status == "RUNNING":
            self.set_status(run.id, "FAILED")
        return self.client.get_run(run.id)

    def only(
        self,
        tag: str,
        value: str,
        name: Callable[[], str],
        more_tags: Mapping[str, str] | None = None,
        started: int | None = None,
    ) -> Run:
        """Return the run with this value of this tag, or create it; call it while holding its lock.

        A slow server, or a lost answer, can create a run twice, because MLflow's client asks again. Empty
        duplicates are deleted.
        """
        if not self._all(tag, value):
            tags = {tag: value, **(more_tags or {})}
            self.client.create_run(self.experiment_id, started, tags, name())
        run, *others = self._all(tag, value)
        for other in (run for run in others if run.is_empty):
            self.client.delete_run(other.id)
        return run

    def end_abandoned(self, tag: str, lock: Callable[[str], Path]) -> None:
        """Set RUNNING runs to FAILED if their process was on this machine and has gone.

        Args:
            tag: the tag whose value distinguishes the runs.
            lock: returns, for this value, the lock file that the process held.
        """
        for run in self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            value = run.tags.get(tag)
            if value and lock(value).exists() and not is_held(lock(value)):
                self.set_status(run.id, "FAILED")

    def _all(self, tag: str, value: str) -> list[Run]:
        query, order = f"tags.{tag} = '{value}'", ["attributes.start_time ASC"]
        runs = self.client.search_runs([self.experiment_id], query, order_by=order)
        return sorted(runs, key=lambda run: run.is_empty)  # stable

    def set_status(self, run_id: str, status: str, ended: int | None = None) -> None:
        """Set the status if it differs; `ended` in milliseconds since 1970, None: now."""
        if self.client.get_run(run_id).status == status:
            return  # setting it again would change the end time
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status, ended)

    def params_by_name(self, start: str) -> dict[str, dict[str, str]]:
        """Return the params of the runs whose name begins with `start`, oldest first."""
        query = f"attributes.run_name LIKE '{start.replace(chr(39), '_')}%'"
        order = ["attributes.start_time ASC"]
        runs = self.client.search_runs([self.experiment_id], query, order_by=order)
        found: dict[str, dict[str, str]] = {}
        for run in runs:
            found.setdefault(run.name, run.params)
        return found

    def send_params(self, run: Run, params: Mapping[str, str]) -> None:
        """Send missing params; MLflow cannot change a param, so a tag `now.KEY` records a changed value."""
        changed = {f"now.{k}": v for k, v in params.items() if run.params.get(k, v) != v}
        for tag in [tag for tag in run.tags if tag.startswith("now.") and tag not in changed]:
            self.client.delete_tag(run.id, tag)
        self.send_tags(run, changed)
        new = {key: value for key, value in params.items() if key not in run.params}
        self.client.send_params(run.id, new)

    def send_tags(self, run: Run, tags: Mapping[str, str]) -> None:
        """Set the tags that are missing or differ."""
        new = {name: value for name, value in tags.items() if run.tags.get(name) != value}
        self.client.send_tags(run.id, new)

    def send_metrics(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Log the single values that are missing or differ."""
        new = [Point(k, 0, v) for k, v in metrics.items() if run.metrics.get(k) != v]
        self.client.send_points(run.id, new)

    def log_points(self, run_id: str, points: Iterable[Point]) -> int:
        """Log the points that the run lacks, and return how many; a resumed training repeats some steps."""
        wanted = {(point.name, point.step): point for point in points}
        for name in {name for name, _ in wanted if (run_id, name) not in self._steps}:
            history = self.client.get_metric_history(run_id, name)
            self._steps[run_id, name] = {metric.step for metric in history}
        new = [p for (name, step), p in wanted.items() if step not in self._steps[run_id, name]]
        self.client.send_points(run_id, new)
        for point in new:
            self._steps[run_id, point.name].add(point.step)
        return len(new)


def existing(root: Path) -> Client:
    """Return a client of MLflow that reads an existing store; nothing is created.

    Raises:
        CapasError: there is no store.
    """
    uri = tracking_uri(root)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise CapasError(
            f"{file} is missing: no run was published in this workspace. Run `dvc repro`, or set "
            "MLFLOW_TRACKING_URI to the server with the run"
        )
    _check_uri(uri)
    with reachable(uri):
        return connect(uri)


def _check_uri(uri: str) -> None:
    """Check first that the store accepts a connection: MLflow itself tries a dead one for minutes.

    Raises:
        UnusableStoreError: the database has no driver here, or a kind that SQLAlchemy does not know.
        CapasError: nothing answers.
    """
    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    port = _port(uri) or _PORTS.get(kind)
    is_database = kind in ("postgres", "postgresql", "mysql", "mariadb", "mssql", "sqlite")
    if is_database:
        _check_driver(uri)
    if parts.hostname is not None and port is not None:
        called = "database" if is_database else "MLflow server"
        try:
            socket.create_connection((parts.hostname, port), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise CapasError(
                f"no {called} answers at {without_secrets(uri)}: {error}\n{RETRY}"
            ) from None
    if is_database:
        _check_database(uri)


def _port(uri: str) -> int | None:
    """Return the port of an address.

    Raises:
        UnusableStoreError: the port is not a number.
    """
    try:
        return urlsplit(uri).port
    except ValueError:
        raise UnusableStoreError(
            f"MLFLOW_TRACKING_URI={without_secrets(uri)}: the port is not a number. In a password, "
            "escape / @ # : as %2F %40 %23 %3A"
        ) from None


def _check_driver(uri: str) -> None:
    """Check that the database has a driver here.

    Raises:
        UnusableStoreError: see `_check_uri`.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    given = f"MLFLOW_TRACKING_URI={without_secrets(uri)}"
    try:
        make_url(uri).get_dialect().import_dbapi()
    except NoSuchModuleError:
        raise UnusableStoreError(
            f"{given}: SQLAlchemy does not know this kind of database. Use "
            "postgresql://USER:PASSWORD@HOST/NAME, mysql+pymysql://USER:PASSWORD@HOST/NAME or "
            "sqlite:///FILE"
        ) from None
    except ModuleNotFoundError as error:
        package = _DRIVERS.get(str(error.name), str(error.name))
        other = ""
        if error.name == "psycopg" and importlib.util.find_spec("psycopg2"):
            other = "; or use postgresql+psycopg2://..., whose driver is installed"
        if error.name == "MySQLdb":
            other = "; or use mysql+pymysql://... and pip install pymysql"
        raise UnusableStoreError(
            f"{given} needs the module {error.name}, which is not installed: pip install {package}{other}"
        ) from None
    except ArgumentError as error:
        raise UnusableStoreError(f"{given} is not a database address: {error}") from None


def _check_database(uri: str) -> None:
    """Check that the database accepts a connection.

    Raises:
        CapasError: it does not, for example because of a wrong password or a missing folder.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    file = sqlite_file(uri)
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        create_engine(uri, poolclass=NullPool).connect().close()
    except OSError as error:
        raise CapasError(
            f"the database {uri} cannot be created: {error.strerror} ({error.filename})"
        ) from None
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0][:300]
        raise CapasError(
            f"the database {without_secrets(uri)} refuses a connection: {without_secrets(reason)}\n{RETRY}"
        ) from None


def _experiment_id(client: Client, name: str, uri: str, root: Path) -> str:
    found, view = client.get_experiment_by_name(name), pages.default_view()
    if found is None:
        # With SQLite and no server, artifacts would go to ./mlruns of the process that comes first.
        local = (home(root) / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
        tags = {**_KIND, pages.VIEW_TAG + pages.VIEW: view}
        return str(client.create_experiment(name, artifact_location=local, tags=tags))
    if found.lifecycle_stage == "deleted":
        raise CapasError(
            f"the MLflow experiment '{name}' was deleted. Restore it with `mlflow experiments "
            f"restore -x {found.experiment_id}` (MLFLOW_TRACKING_URI={without_secrets(uri)}), or "
            "set tracking.experiment_name to another name"
        )
    if found.tags.get(pages.VIEW_TAG + pages.VIEW) != view:
        client.set_experiment_tag(found.experiment_id, pages.VIEW_TAG + pages.VIEW, view)
    return str(found.experiment_id)
