"""Records as parquet: what is refused, and that the same records are the same bytes."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checking import check
from conftest import stored

from capas.core.errors import CapasError
from capas.core.records import (
    FORMATTED,
    RAW,
    ROWS_PER_GROUP,
    TOKENIZED,
    read_records,
    write_records,
    write_tables,
)

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def raw_records(count: int) -> list[dict[str, Any]]:
    record = {"messages": HELLO, "metadata": "{}"}
    return [stored({"id": f"r{i}", **record}) for i in range(count)]


def test_records_survive_the_file(tmp_path: Path) -> None:
    record = {"id": "ñ", "messages": [*HELLO, {"role": "user", "content": "a\0b \u200d🦊\r\n"}]}
    written = check({**record, "metadata": {"b": 1, "a": "é"}})
    assert write_records(tmp_path / "x.parquet", RAW, written) == 1
    assert list(read_records(tmp_path / "x.parquet", RAW)) == written
    assert written[0]["metadata"] == '{"a": "é", "b": 1}'


def test_the_same_records_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_records(tmp_path / name, RAW, iter(raw_records(ROWS_PER_GROUP + 7)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rows_are_grouped_whatever_the_split_holds(tmp_path: Path) -> None:
    count = 2 * ROWS_PER_GROUP + 1
    assert write_records(tmp_path / "a", RAW, raw_records(count)) == count
    assert pq.ParquetFile(tmp_path / "a").num_row_groups == 3
    assert [r["id"] for r in read_records(tmp_path / "a", RAW)] == [f"r{i}" for i in range(count)]


@pytest.mark.parametrize("length", [1, 700, 2 * ROWS_PER_GROUP + 3])
def test_tables_of_any_length_give_the_same_bytes(tmp_path: Path, length: int) -> None:
    records = raw_records(2 * ROWS_PER_GROUP + 50)
    write_records(tmp_path / "a", RAW, records)
    table = pa.Table.from_pylist(records, schema=RAW)
    parts = (table.slice(start, length) for start in range(0, len(table), length))
    assert write_tables(tmp_path / "b", RAW, parts) == len(records)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_split_is_a_file_with_columns(tmp_path: Path) -> None:
    assert write_records(tmp_path / "a", TOKENIZED, []) == 0
    assert list(read_records(tmp_path / "a", TOKENIZED)) == []


def test_a_parquet_file_holds_no_pandas_metadata(tmp_path: Path) -> None:
    write_records(tmp_path / "a", RAW, raw_records(1))
    assert set(pq.ParquetFile(tmp_path / "a").metadata.metadata or {}) <= {b"ARROW:schema"}


def test_other_columns_are_refused_with_both_lists(tmp_path: Path) -> None:
    write_records(tmp_path / "a.parquet", RAW, raw_records(1))
    with pytest.raises(
        CapasError, match=r"a\.parquet does not have the columns(.|\n)*found(.|\n)*labels"
    ):
        list(read_records(tmp_path / "a.parquet", FORMATTED))


def test_half_a_file_is_refused_by_name(tmp_path: Path) -> None:
    write_records(tmp_path / "a", RAW, raw_records(50))
    (tmp_path / "half.parquet").write_bytes((tmp_path / "a").read_bytes()[:-9])
    with pytest.raises(CapasError, match=r"half\.parquet is not a complete parquet file"):
        list(read_records(tmp_path / "half.parquet", RAW))
