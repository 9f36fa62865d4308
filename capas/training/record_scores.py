"""Keep the scores of each validation record at the weights that a training saves.

reports/validation_records.parquet, in the order of data/formatted/validation.parquet::

    id              loss_sum  num_hits  num_supervised_tokens
    timer-en-00017      0.81        27                     28     loss in nats, summed over the tokens

Their sums are the validation loss and token accuracy of reports/metrics/train.json. A sweep reads them to say
whether two settings differ by more than the choice of these records.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from capas.core.records import write_records

FILE = "reports/validation_records.parquet"
_KEPT = "record_scores.json"  # in a checkpoint
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("loss_sum", pa.float64(), nullable=False),
        pa.field("num_hits", pa.int32(), nullable=False),
        pa.field("num_supervised_tokens", pa.int32(), nullable=False),
    ]
)
Scores = list[list[float]]  # [records, 3], the rows of `batches.score_tokens`


class RecordScores:
    """The scores of the last evaluation and of the best one, by their step."""

    def __init__(self) -> None:
        self._by_step: dict[int, Scores] = {}

    def add(self, step: int, scores: Scores, best_step: int | None) -> None:
        """Keep the scores of an evaluation, and of the earlier ones only the best."""
        best = {s: found for s, found in self._by_step.items() if s == best_step}
        self._by_step = {**best, step: scores}

    def of(self, step: int) -> Scores:
        """Return the scores at `step`, the last evaluation or the best one."""
        return self._by_step[step]

    def write(self, checkpoint: Path) -> None:
        (checkpoint / _KEPT).write_text(json.dumps(self._by_step), encoding="utf-8")

    def read(self, checkpoint: Path) -> None:
        """Restore the scores that a checkpoint holds."""
        found = json.loads((checkpoint / _KEPT).read_text(encoding="utf-8"))
        self._by_step = {int(step): scores for step, scores in found.items()}


def in_data_order(scores: Sequence[Any], order: Sequence[int]) -> Scores:
    """Return scores in the order of the records.

    Args:
        order: the index of the record that each row of `scores` belongs to.
    """
    rows = dict(zip(order, scores, strict=True))
    return [[float(value) for value in rows[index]] for index in range(len(rows))]


def write_scores(file: Path, ids: Sequence[str], scores: Scores) -> None:
    """Write reports/validation_records.parquet."""
    write_records(file, SCHEMA, _rows(ids, scores))


def _rows(ids: Sequence[str], scores: Scores) -> Iterator[dict[str, Any]]:
    for name, (loss, hits, count) in zip(ids, scores, strict=True):
        yield {
            "id": name,
            "loss_sum": loss,
            "num_hits": int(hits),
            "num_supervised_tokens": int(count),
        }
