"""Rows of different lengths in flat arrays, and what of them Arrow gets without pandas."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from capas.core.ragged import (
    Ragged,
    any_in_row,
    concatenate,
    from_arrow,
    gather,
    ranges,
    texts_to_arrow,
    to_arrow,
)
from capas.core.records import FORMATTED

ROWS = [[1, 2, 3], [], [4], [5, 6]]
IDS = FORMATTED.field("input_ids").type


def rows_of(ragged: Ragged) -> list[list[int]]:
    return [ragged.row(index).tolist() for index in range(len(ragged))]


def test_rows_come_back() -> None:
    ragged = Ragged.of(ROWS, np.int32)
    assert rows_of(ragged) == ROWS
    assert ragged.lengths.tolist() == [3, 0, 1, 2]
    assert rows_of(Ragged.of([], np.int32)) == []


def test_rows_are_taken_in_any_order() -> None:
    assert rows_of(Ragged.of(ROWS, np.int32).take(np.array([3, 1, 0]))) == [[5, 6], [], [1, 2, 3]]


def test_ranges_and_what_they_gather() -> None:
    assert ranges(np.array([5, 0, 2]), np.array([2, 0, 1])).tolist() == [5, 6, 2]
    found = gather(np.arange(10) * 10, np.array([5, 0, 2]), np.array([2, 0, 1]))
    assert rows_of(found) == [[50, 60], [], [20]]


def test_parts_are_put_one_after_the_other() -> None:
    parts = [Ragged.of(ROWS[:2], np.int32), Ragged.of(ROWS[2:], np.int32)]
    assert rows_of(concatenate(parts)) == ROWS


@pytest.mark.parametrize("start", [0, 1, 3])
def test_arrow_gives_and_takes_the_same_rows(start: int) -> None:
    column = Ragged.of(ROWS, np.int32).to_arrow(IDS)
    assert column.to_pylist() == ROWS
    assert column.type == IDS
    assert rows_of(Ragged.from_arrow(column.slice(start))) == ROWS[start:]


def test_a_row_has_a_mark() -> None:
    offsets = Ragged.of(ROWS, np.int32).offsets
    marks = np.array([False, True, False, False, False, False])
    assert any_in_row(marks, offsets).tolist() == [True, False, False, False]


def test_numbers_and_texts() -> None:
    assert to_arrow(np.array([1, 2]), pa.int64()).to_pylist() == [1, 2]
    assert from_arrow(pa.array([7, 8], pa.int32()).slice(1)).tolist() == [8]
    texts = ["", "ñ🦊", "a\0b", ""]
    assert texts_to_arrow(texts).to_pylist() == texts
    assert texts_to_arrow([]).to_pylist() == []


def test_data_stages_do_without_pandas_and_transformers() -> None:
    """Both are slower to import than tens of thousands of records are to prepare."""
    code = (
        "import sys; sys.path.insert(0, 'stages'); import tokenize_messages, format_chat; "
        "import numpy as np; from capas.core.ragged import *; from capas.core.records import FORMATTED; "
        "r = Ragged.of([[1]], np.int32).to_arrow(FORMATTED.field('input_ids').type); "
        "Ragged.from_arrow(r); texts_to_arrow(['a']); "
        "print(sorted({'pandas', 'torch', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
