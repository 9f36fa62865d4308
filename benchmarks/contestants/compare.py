"""How many records of (b) and (e) have the same ids, and the same tokens trained.

python compare.py WORKSPACE ARROW_FILE...
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets

from capas.core.records import IGNORE_INDEX

SPLITS = ("train", "validation", "test")


def main(workspace: Path, arrow_files: list[str]) -> None:
    theirs = concatenate_datasets([Dataset.from_file(file) for file in arrow_files]).data.table
    parts = [pq.read_table(workspace / f"data/formatted/{split}.parquet") for split in SPLITS]
    ours = pa.concat_tables(parts)
    assert len(ours) == len(theirs), f"{len(ours)} records of capas, {len(theirs)} of datasets.map"
    ids = zip(rows(ours["input_ids"]), rows(theirs["input_ids"]), strict=True)
    masks = zip(rows(ours["labels"]), rows(theirs["assistant_masks"]), strict=True)
    facts = {
        "num_records": len(ours),
        "num_equal_ids": sum(np.array_equal(a, b) for a, b in ids),
        "num_equal_masks": sum(np.array_equal(a != IGNORE_INDEX, b != 0) for a, b in masks),
    }
    print(json.dumps(facts))


def rows(column: pa.ChunkedArray) -> Any:
    for chunk in column.chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        for first, end in pairwise(offsets):
            yield values[first:end]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
