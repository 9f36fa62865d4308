"""What an inspection says of a data set, without a model or a tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from dataside import DataSide
from shipped import composed

from capas.core.dag import StageSpec
from capas.core.errors import CapasError
from capas.core.params import Params, select
from capas.dataset.inspect import Copy, Inspection
from capas.dataset.preview import preview


@pytest.fixture
def side(tmp_path: Path, tiny_tokenizer_dir: Path) -> DataSide:
    return DataSide(tmp_path, tiny_tokenizer_dir)


def inspected(side: DataSide, *overrides: str) -> Inspection:
    values = composed(["dataset=own_jsonl", *overrides])
    keys = StageSpec.read("fetch", side.root).keys
    return preview(Params(select(values, keys)).dataset, side.root).inspection


def asked(number: Any, **more: Any) -> dict[str, Any]:
    return {"question": f"Question {number}?", "answer": f"Answer {number}.", **more}


def test_shapes_columns_flaws_copies_and_lengths_are_told(side: DataSide) -> None:
    name = side.own(
        "mine.jsonl",
        *(asked(n, topic="x") for n in range(9)),
        asked(1, topic="y"),
        asked("much longer " * 5),
        asked(2, answer=" "),
        asked(3, answer=7),
        {"text": "plain"},
    )
    found = inspected(side, "dataset.flaws.not_text=drop")
    [source] = found.sources
    assert source.shapes == {"question_answer": 13, "text": 1}
    assert source.why.startswith("13 records have the columns question, answer of question_answer;")
    assert source.columns == {"question": 13, "answer": 13, "topic": 10, "text": 1}
    assert (source.splits, source.files[0]["file"]) == ({"train": 14}, name)
    assert (found.num_read, found.num_valid, found.left_out) == (14, 12, {"topic": 10})
    kinds = {kind: (flaw.count, flaw.policy) for kind, flaw in found.flaws.items()}
    assert kinds == {"empty_answer": (1, "error"), "not_text": (1, "drop")}
    assert found.flaws["empty_answer"].examples[0]["at"] == "line 12"
    assert (found.duplicates, found.copies) == (1, [Copy(f"{name}, line 10", f"{name}, line 2")])
    assert found.lengths is not None
    assert (found.lengths.shortest, found.lengths.median) == (5, 20)
    assert (found.lengths.largest, found.lengths.longest) == (138, f"{name}, line 11")


def test_the_form_of_a_file_is_told(side: DataSide) -> None:
    (side.root / "data/own/x.csv").write_bytes("q;a\n¿qué?;sí\n".encode("cp1252"))
    stated = ["dataset.path=csv", "dataset.data_files=data/own/x.csv", "dataset.shape=columns"]
    found = inspected(side, *stated, "dataset.columns={user: q, assistant: a}")
    facts = found.sources[0].files[0]
    assert (facts["encoding"], facts["separator"], found.num_valid) == ("cp1252", ";", 1)
    assert found.sources[0].why == "dataset.shape states columns"


def test_a_source_without_a_right_record_has_no_lengths(side: DataSide) -> None:
    side.own("mine.jsonl", asked(1, answer=""))
    assert inspected(side).lengths is None
    side.own("mine.jsonl", {"pregunta": "x"})
    with pytest.raises(CapasError, match="columns are pregunta: no known shape"):
        inspected(side)


def test_the_embedded_records_are_inspected(side: DataSide) -> None:
    small = ("num_train=24", "num_validation=4", "num_test_per_kind=2")
    found = inspected(side, "dataset=embedded", *(f"dataset.{key}" for key in small))
    assert (found.num_valid, found.flaws) == (38, {})
    assert found.sources[0].splits == {"train": 24, "validation": 4, "test": 10}
