"""Describe a recorded result: its parameters, metrics and answers, as far as they are on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from capas.compare.outputs import Outputs
from capas.compare.tracked import Tracked
from capas.core.dag import recorded_key
from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.evaluation.names import LABEL_SCORES, LOG_LOSS

Kind = Literal["workspace", "commit", "experiment", "run"]
Row = dict[str, Any]
WORKSPACE, HEAD = "workspace", "HEAD"
RUN = "run:"  # prefix for an MLflow run whose name is also that of a commit or an experiment
METRICS = "reports/metrics/tuned.json"
PREDICTIONS = "reports/predictions.parquet"
ADAPTER_FOLDER, CERTIFICATE = "data/models/adapter", "reports/certificate.json"
# Columns of the predictions that are not metrics.
_COLUMNS = frozenset(
    (
        *("id", "metadata", "prompt", "reference", "completion", "loss", "num_supervised_tokens"),
        *("token_accuracy", "copied_values", "stopped", "empty", "control_token"),
        *(LOG_LOSS, "label_probabilities"),
    )
)


@dataclass(frozen=True)
class Predictions:
    """A model's answers to the test records.

    Attributes:
        metrics: the columns with scores, the headline first.
    """

    rows: list[Row]
    metrics: list[str]

    @property
    def has_tokens(self) -> bool:
        """Return whether the number of tokens is known for each record's loss."""
        return all("num_supervised_tokens" in row for row in self.rows)


@dataclass(frozen=True)
class Side:
    """A result under one name.

    Attributes:
        texts: the parameters with which its stages ran.
        lock: the stages of its dvc.lock; empty for a row that only MLflow's database has.
        metrics: the metrics of the tuned model.
    """

    name: str
    kind: Kind
    origin: str
    texts: dict[str, str]
    lock: dict[str, Any]
    metrics: dict[str, Any]
    outputs: Outputs
    time: float
    commit: str | None = None
    baseline: dict[str, Any] = field(default_factory=dict)  # metrics of the base model
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, if known
    cpu: str | None = None
    tracked_sha256: str | None = None
    run: Tracked | None = None  # the run that published it
    table: Path | None = None  # the run's artifact TABLE
    same_as: str = ""  # another name of the same result
    pending: str = ""  # edits of the workspace that no stage has run with

    @property
    def has_result(self) -> bool:
        return bool(self.metrics)

    @property
    def train_key(self) -> str | None:
        return recorded_key(self.lock["train"]) if "train" in self.lock else None

    @cached_property
    def predictions(self) -> Predictions | None:
        """The answers, or None if they are neither in DVC's cache nor in MLflow."""
        if file := self.outputs.find(PREDICTIONS):
            found = read_table(file)
            names = [name for name in found.column_names if name not in _COLUMNS]
            return Predictions(found.to_pylist(), names)
        if self.table is None:
            return None
        table = read_json(self.table)
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        names = [name for name in self.metrics_named if name in table["columns"]]
        return Predictions([{**row, "completion": row["tuned"]} for row in rows], names)

    @property
    def metrics_named(self) -> list[str]:
        """Names of the metrics in reports/metrics/tuned.json, the headline first."""
        first = [n for n in self.metrics if f"{n}_gain_low" in self.metrics]
        fixed = {"loss", "perplexity", "token_accuracy", "stop_rate", *LABEL_SCORES, *first}
        others = (n for n, value in self.metrics.items() if n not in fixed and value is not None)
        return [*first, *(n for n in others if "_gain" not in n and not n.endswith("_rate"))]

    @cached_property
    def sha256(self) -> str | None:
        """The SHA-256 of the adapter, or None if neither its certificate nor MLflow's tag is here."""
        if file := self.outputs.find(CERTIFICATE):
            found: str = read_json(file)["adapter_sha256"]
            return found
        return self.tracked_sha256

    @cached_property
    def num_train(self) -> int | None:
        """The number of training records that format kept, or None if its report is not here."""
        file = self.outputs.find("reports/format.json")
        return None if file is None else int(read_json(file)["splits"]["train"]["num_records"])

    @property
    def stale(self) -> str | None:
        """The name of the stage whose scores are of an earlier adapter, because it has not run since."""
        used = {d["path"]: d["md5"] for d in self.lock.get("evaluate", {}).get("deps", [])}
        made = self.outputs.md5.get(ADAPTER_FOLDER)
        return "evaluate" if made and used.get(ADAPTER_FOLDER, made) != made else None


def read_table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a parquet file without pyarrow.dataset, which imports pandas.

    Raises:
        CapasError: the file is damaged.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.read(columns)
    except pa.ArrowInvalid as error:
        raise CapasError(
            f"{file} is no complete parquet file ({error}): delete it, then `dvc pull` or `dvc repro`"
        ) from None
