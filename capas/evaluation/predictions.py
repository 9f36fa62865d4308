"""Define and read the tables of predictions, which have one row for each test record."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capas.core.errors import CapasError
from capas.core.records import read_records
from capas.evaluation.names import BINARY, LOG_LOSS, compares_labels

Row = dict[str, Any]
RATES = {  # columns of predictions -> keys of the reports
    "stopped": "stop_rate",
    "empty": "empty_rate",
    "control_token": "control_token_rate",
}


def predictions_schema(names: list[str]) -> pa.Schema:
    """Return the schema of predictions.

    Without metrics nothing is generated, and prompt and completion are null. If labels are compared, the
    completion is the most probable one.
    """
    fields = [
        *((name, pa.string()) for name in ("id", "metadata", "prompt", "reference", "completion")),
        ("loss", pa.float64()),
        ("num_supervised_tokens", pa.int32()),
        ("token_accuracy", pa.float64()),
        *_score_fields(names),
        *((name, pa.bool_()) for name in RATES),
        *(_LABEL_FIELDS if compares_labels(names) else ()),
    ]
    return pa.schema(fields)


_LABEL_FIELDS = (
    (LOG_LOSS, pa.float64()),
    (
        "label_probabilities",
        pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())])),
    ),
)


def copies_schema(names: list[str]) -> pa.Schema:
    """Return the schema of copied answers: as completion, the answer of the most similar training record."""
    texts = ("id", "metadata", "prompt", "reference", "completion", "nearest_id")
    fields = [*((name, pa.string()) for name in texts), ("similarity", pa.float64())]
    return pa.schema([*fields, *_score_fields(names)])


def _score_fields(names: list[str]) -> list[tuple[str, pa.DataType]]:
    scores = [(name, pa.bool_() if name in BINARY else pa.float64()) for name in names]
    return [*scores, ("copied_values", pa.bool_())]


def read_base(file: Path, names: list[str], rows: list[Row], of_more: bool = False) -> list[Row]:
    """Read the base's scores, a file in reports/, of the records that `rows` of the tuned model have.

    Args:
        of_more: the file may have further records.

    Raises:
        CapasError: the base was scored by other metrics than `names`, or on other records.
    """
    schema = predictions_schema(names)
    found = pq.read_schema(file).names
    if found != schema.names:
        other = ", ".join(sorted({*found} ^ {*schema.names})) or "their order"
        raise CapasError(
            f"reports/{file.name} has scores of other metrics than evaluation.metrics "
            f"({other}). Run `dvc repro evaluate_base`, or try other metrics on the base: python "
            "stages/evaluate_model.py base ..."
        )
    before, wanted = list(read_records(file, schema)), [row["id"] for row in rows]
    chosen = [row for row in before if row["id"] in set(wanted)] if of_more else before
    if [row["id"] for row in chosen] != wanted:
        raise CapasError(
            f"reports/{file.name} has other records ({len(before)}) than the tuned model ({len(rows)}): "
            "evaluation.max_records, evaluation.noise_records or the data have changed. Run `dvc repro "
            "evaluate_base`"
        )
    return chosen


def read_copies(file: Path) -> list[Row]:
    """Read reports/predictions_nearest.parquet."""
    found: list[Row] = pq.read_table(file).to_pylist()
    return found
