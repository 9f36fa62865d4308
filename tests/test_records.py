"""Records as parquet: what is refused, and that the same records are the same bytes."""

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import stored

from capas.errors import CapasError
from capas.records import (
    FORMATTED,
    RAW,
    ROWS_PER_GROUP,
    TOKENIZED,
    content_sha256,
    read_records,
    write_records,
)
from capas.validation import to_raw

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def check(record: Any, *more: Any) -> list[dict[str, Any]]:
    return list(to_raw("my.jsonl", "train", [record, *more]))


def with_messages(messages: Any) -> dict[str, Any]:
    return {"id": "a", "messages": messages}


def raw_records(count: int) -> list[dict[str, Any]]:
    record = {"messages": HELLO, "metadata": "{}"}
    return [stored({"id": f"r{i}", **record}) for i in range(count)]


def test_records_survive_the_file(tmp_path: Path) -> None:
    record = {"id": "ñ", "messages": [*HELLO, {"role": "user", "content": "a\0b \u200d🦊\r\n"}]}
    written = list(to_raw("x", "train", [{**record, "metadata": {"b": 1, "a": "é"}}]))
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


def test_an_empty_split_is_a_file_with_columns(tmp_path: Path) -> None:
    assert write_records(tmp_path / "a", TOKENIZED, []) == 0
    assert list(read_records(tmp_path / "a", TOKENIZED)) == []


def test_a_parquet_file_holds_no_pandas_metadata(tmp_path: Path) -> None:
    write_records(tmp_path / "a", RAW, raw_records(1))
    assert set(pq.ParquetFile(tmp_path / "a").metadata.metadata or {}) <= {b"ARROW:schema"}


def test_other_columns_are_refused_with_both_lists(tmp_path: Path) -> None:
    write_records(tmp_path / "a.parquet", RAW, raw_records(1))
    with pytest.raises(CapasError, match=r"a\.parquet has other columns(.|\n)*found(.|\n)*labels"):
        list(read_records(tmp_path / "a.parquet", FORMATTED))


def test_half_a_file_is_refused_by_name(tmp_path: Path) -> None:
    write_records(tmp_path / "a", RAW, raw_records(50))
    (tmp_path / "half.parquet").write_bytes((tmp_path / "a").read_bytes()[:-9])
    with pytest.raises(CapasError, match=r"half\.parquet is no complete parquet file"):
        list(read_records(tmp_path / "half.parquet", RAW))


def test_identity_follows_contents_not_the_order_of_keys() -> None:
    one, other = {"id": "a", "metadata": "{}"}, {"metadata": "{}", "id": "a"}
    assert content_sha256([one]) == content_sha256([other])
    assert content_sha256([one]) != content_sha256([{**one, "id": "b"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ('[{"role": "user"}]', "messages is a text.*json.loads"),
        ([], "messages is \\[\\]"),
        (None, "messages is None"),
        (["Hi", "Hello"], r"messages\[0\] is 'Hi'"),
        ([{"content": "Hi"}, HELLO[1]], r"messages\[0\]: role is None; known roles: system"),
        ([{"role": "user ", "content": "Hi"}, HELLO[1]], "role is 'user '"),
        ([{"role": "tool", "content": "Hi"}, HELLO[1]], "role is 'tool'"),
        ([{"role": "user"}, HELLO[1]], "content is None"),
        ([{"role": "user", "content": 42}, HELLO[1]], "content is 42"),
        ([HELLO[0], {"role": "assistant", "content": float("nan")}], "content is nan"),
        ([HELLO[0], {"role": "assistant", "content": {"text": "x"}}], "content is {'text'"),
        ([HELLO[0], {"role": "assistant", "content": " \n"}], "empty answer"),
        ([{"role": "system", "content": "Be kind"}], "nothing to train on"),
        ([{"role": "user", "content": "a\ud83d"}, HELLO[1]], "surrogate"),
        ([{**HELLO[0], "tool_calls": []}, HELLO[1]], "unknown key tool_calls"),
    ],
)
def test_a_bad_conversation_is_refused(messages: Any, message: str) -> None:
    with pytest.raises(CapasError, match=message) as refusal:
        check({"id": "ok", "messages": HELLO}, with_messages(messages))
    assert str(refusal.value).startswith("my.jsonl, train record 1 (id 'a'): ")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "record 0 is 'text', not an object"),
        ({"messages": HELLO}, "id is None"),
        ({"id": 7, "messages": HELLO}, "id is 7"),
        ({"id": "a", "messages": HELLO, "conversation": 1}, "unknown key conversation"),
        ({"id": "a", "messages": HELLO, "metadata": "x"}, "metadata is 'x'"),
        ({"id": "a", "messages": HELLO, "metadata": {"x": float("nan")}}, "metadata is not JSON"),
    ],
)
def test_a_bad_record_is_refused(record: Any, message: str) -> None:
    with pytest.raises(CapasError, match=re.escape(message)):
        check(record)


def test_an_id_that_occurs_twice_is_refused_with_both_places() -> None:
    with pytest.raises(CapasError, match="record 1: id 'a' is that of record 0"):
        check(with_messages(HELLO), with_messages(HELLO))


def test_an_empty_user_message_is_kept() -> None:
    messages = [{"role": "user", "content": ""}, HELLO[1]]
    assert check(with_messages(messages))[0]["messages"][0]["content"] == ""
