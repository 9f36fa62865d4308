"""Read the training runs of a local MLflow database without MLflow, whose import takes seconds."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from capas.core.errors import CapasError
from capas.tracking.lineage import ADAPTER
from capas.tracking.store import EXPERIMENT, TRAIN_KEY, sqlite_file, tracking_uri

CPU = "cpu"  # a tag
PUBLISHED = ("dvc.lock", "params.yaml")  # artifacts of a run whose publish has finished
TABLE = "predictions.json"  # an artifact: the test records with both models' answers
_RUNS = """
select runs.run_uuid, coalesce(runs.name, ''), runs.start_time, tags.value, runs.artifact_uri,
    runs.experiment_id
from runs join tags on tags.run_uuid = runs.run_uuid and tags.key = ?
where runs.lifecycle_stage = 'active' order by runs.start_time desc
"""


@dataclass(frozen=True)
class Tracked:
    """A training run as MLflow stores it.

    Attributes:
        texts: its parameters and its tags.
    """

    run_id: str
    name: str
    train_key: str
    time: float
    metrics: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    artifacts: str = ""  # address of the artifacts
    experiment_id: str = ""

    def below(self, prefix: str) -> dict[str, float]:
        """Return the metrics whose names begin with `prefix`, without it."""
        known = self.metrics.items()
        return {k.removeprefix(prefix): v for k, v in known if k.startswith(prefix)}

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each stage, where they are known."""
        return self.below("seconds.")

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the tuned model, in the form of reports/metrics/tuned.json."""
        return self.below("tuned.")

    @property
    def folder(self) -> Path | None:
        """The folder of its artifacts, or None if they are not complete on this disk."""
        if not self.artifacts.startswith("file:"):
            return None
        folder = Path(unquote(urlsplit(self.artifacts).path))
        return folder if all((folder / name).is_file() for name in PUBLISHED) else None

    def is_called(self, word: str) -> bool:
        """Return whether `word` is its name, its id or key, or the beginning of one: see `tracking.runs`."""
        ids = self.run_id, self.train_key
        names = self.name, self.texts.get(EXPERIMENT)
        return word in names or any(found.startswith(word) for found in ids)

    @property
    def cpu(self) -> str | None:
        return self.texts.get(CPU)

    @property
    def sha256(self) -> str | None:
        return self.texts.get(ADAPTER)


def database(root: Path) -> Path | None:
    """Return the file of the MLflow store; None if the store is a server or nothing was published yet."""
    file = sqlite_file(tracking_uri(root))
    return file if file is not None and file.is_file() else None


def read_runs(root: Path) -> list[Tracked]:
    """Return the training runs, newest first; empty if the store is not a local database.

    Raises:
        CapasError: the database is damaged, or its version of MLflow uses other tables.
    """
    file = database(root)
    if file is None:
        return []
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as base:
            return list(_runs(base))
    except sqlite3.Error as error:
        raise CapasError(f"{file} cannot be read: {error}") from None


def _runs(base: sqlite3.Connection) -> Iterator[Tracked]:
    for run_id, name, started, key, artifacts, experiment in base.execute(
        _RUNS, [TRAIN_KEY]
    ).fetchall():
        metrics = _pairs(base, "latest_metrics", run_id)
        texts = {**_pairs(base, "tags", run_id), **_pairs(base, "params", run_id)}
        numbers = {k: float(v) for k, v in metrics.items()}
        yield Tracked(
            run_id, name, key, started / 1000, numbers, texts, artifacts or "", str(experiment)
        )


def _pairs(base: sqlite3.Connection, table: str, run_id: str) -> dict[str, str]:
    found = base.execute(f"select key, value from {table} where run_uuid = ?", [run_id])
    return {key: value for key, value in found if value is not None}
