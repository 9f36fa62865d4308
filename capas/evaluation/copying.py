"""Copy the answer of the most similar training record, as a baseline beside base and tuned model."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from capas.evaluation.copied import copied_values
from capas.evaluation.nearest import nearest_prompts
from capas.evaluation.predictions import Row
from capas.evaluation.prompts import read_questions
from capas.evaluation.scorer import Scorer


def copy_nearest(records: list[Row], scorer: Scorer, formatted: Path, raw: Path) -> list[Row]:
    """Answer each record with the answer of the training record whose prompt is most similar.

    Args:
        formatted, raw: the folders data/formatted and data/raw.

    Returns:
        Rows of predictions_nearest.parquet; no row if no metric is chosen, because nothing is generated then.
    """
    if not scorer.names:
        return []
    train = list(read_answers(formatted / "train.parquet"))
    known = read_questions(raw / "train.parquet", {row["id"] for row in train})
    questions = read_questions(raw / "test.parquet", {row["id"] for row in records})
    found = nearest_prompts([questions[r["id"]] for r in records], [known[r["id"]] for r in train])
    rows = []
    for record, neighbour in zip(records, found, strict=True):
        copied = train[neighbour.index]
        row = {name: record[name] for name in ("id", "metadata", "prompt", "reference")}
        text = copied["reference"]
        rows.append(
            {
                **row,
                "completion": text,
                "nearest_id": copied["id"],
                "similarity": neighbour.similarity,
                **scorer.score(text, row),
                "copied_values": copied_values(text, row["reference"], row["prompt"]),
            }
        )
    return rows


def read_answers(file: Path) -> Iterator[Row]:
    """Yield the id and the reference of each record of a formatted split."""
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=["id", "reference"]):
            yield from batch.to_pylist()
