"""Functions of the user's own as metrics: copied by compose, called by evaluate, their errors told."""

import json
from pathlib import Path

import pytest

from capas.core.errors import CapasError
from capas.evaluation.scorer import Scorer
from capas.evaluation.user_metrics import load_functions, read_sources

FILE = "data/own/scores.py"
POLITE = f"{FILE}:politeness"
SOURCE = """
import math
import numpy as np
import torch
from dataclasses import dataclass

@dataclass
class Words:
    polite: "frozenset[str]"

WORDS = Words(frozenset({"please", "gracias"}))

def politeness(completion, reference, record):
    return any(word in WORDS.polite for word in completion.lower().split())

def tone(completion, reference, record):
    record["metadata"]["seen"] = True
    return record["metadata"]["tone"] + len(record["prompt"]) / 8 + (record["id"] == "r2")

def wrong(completion, reference, record):
    return {"nan": math.nan, "inf": math.inf, "text": "1", "none": None, "huge": 10**400,
            "above": 1.7, "below": -3, "percent": np.float64(85), "array": np.zeros(2)}[completion]

def scalar(completion, reference, record):
    return {"bool": np.bool_(True), "float": np.float32(0.5), "int": np.int64(1), "one": 1 + 1e-15,
            "zero": np.array(0.25), "tensor": torch.tensor(0.75), "false": np.False_}[completion]
"""
ROW = {"id": "r1", "prompt": "Hi", "reference": "please", "metadata": json.dumps({"tone": 0.5})}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data/own").mkdir(parents=True)
    (tmp_path / FILE).write_text(SOURCE)
    return tmp_path


def scorer(root: Path, *metrics: str) -> Scorer:
    composed = root / "metrics.json"
    composed.write_text(json.dumps({"sources": read_sources(metrics, root)}))
    return Scorer(metrics, composed)


def test_it_stands_beside_the_others_under_its_own_name(root: Path) -> None:
    found = scorer(root, POLITE, "exact_match", f"{FILE}:tone")
    assert found.names == ["politeness", "exact_match", "tone"]
    assert found.score("Gracias a ti", ROW) == {
        "politeness": 1.0,
        "exact_match": False,
        "tone": 0.75,
    }
    assert found.score("please", ROW) == {"politeness": 1.0, "exact_match": True, "tone": 0.75}


def test_a_function_that_edits_its_record_changes_no_other_call(root: Path) -> None:
    found, row = scorer(root, f"{FILE}:tone"), dict(ROW)
    assert found.score("", row) == found.score("", row)
    assert row == ROW


def test_a_file_is_copied_once_and_an_edit_of_it_is_another_copy(root: Path) -> None:
    sources = read_sources([POLITE, "exact_match", f"{FILE}:tone"], root)
    assert sources == {FILE: SOURCE}
    (root / FILE).write_text(SOURCE + "# edited\n")
    assert read_sources([POLITE], root) != sources
    assert read_sources(["exact_match"], root) == {}


@pytest.mark.parametrize(
    "value", ["nan", "inf", "text", "none", "huge", "above", "below", "percent", "array"]
)
def test_what_is_no_number_from_0_to_1_is_refused(root: Path, value: str) -> None:
    metric = f"{FILE}:wrong"
    with pytest.raises(
        CapasError, match=rf"{metric}, test record r1: the function returned .*a number from 0 to 1"
    ):
        scorer(root, metric).score(value, ROW)


def test_scalars_of_numpy_and_torch_count_as_pythons(root: Path) -> None:
    found = scorer(root, f"{FILE}:scalar")
    scores = {"bool": 1.0, "float": 0.5, "int": 1.0, "one": 1.0, "zero": 0.25, "tensor": 0.75}
    assert {name: found.score(name, ROW)["scalar"] for name in scores} == scores
    assert found.score("false", ROW) == {"scalar": 0.0}


def test_an_error_in_it_names_file_function_record_and_line(root: Path) -> None:
    row = {**ROW, "metadata": "{}"}
    text = rf"{FILE}:tone, test record r1: KeyError: 'tone' \({FILE}, line 18\)"
    with pytest.raises(CapasError, match=text):
        scorer(root, f"{FILE}:tone").score("", row)


def test_it_is_tried_before_anything_is_generated(root: Path) -> None:
    found = scorer(root, f"{FILE}:wrong")
    with pytest.raises(CapasError, match="KeyError: 'please'"):
        found.check([ROW])


@pytest.mark.parametrize(
    ("source", "metric", "message"),
    [
        (SOURCE, "scores.py:politeness", "move the file into conf or data/own"),
        (SOURCE, "data/own/../scores.py:politeness", "move the file into conf or data/own"),
        (SOURCE, "data/ownings/scores.py:politeness", "move the file into conf or data/own"),
        (SOURCE, "data/own/score.py:politeness", "there is no data/own/score.py"),
        (SOURCE, f"{FILE}:rudeness", "defines no rudeness; it has politeness, tone, wrong, scalar"),
        ("def politeness(:\n", POLITE, r"scores.py is not valid Python: .*line 1"),
    ],
)
def test_compose_refuses_what_evaluate_could_not_use(
    root: Path, source: str, metric: str, message: str
) -> None:
    (root / FILE).write_text(source)
    with pytest.raises(CapasError, match=message):
        read_sources([metric], root)


def test_compose_does_not_execute_it(root: Path) -> None:
    (root / FILE).write_text("open('ran', 'w')\npoliteness = len\n")
    assert FILE in read_sources([POLITE], root)
    assert not (root / "ran").exists() and not Path("ran").exists()


def test_a_file_in_another_encoding_or_behind_a_linked_folder_is_refused(root: Path) -> None:
    (root / FILE).write_bytes(b"# \xff\n")
    with pytest.raises(CapasError, match="is not UTF-8"):
        read_sources([POLITE], root)
    (root / "data/own/linked").symlink_to(root)
    with pytest.raises(CapasError, match="a parent folder is a link"):
        read_sources(["data/own/linked/scores.py:politeness"], root)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_that_name\n", rf"ModuleNotFoundError: .* \({FILE}, line 1\)"),
        ("politeness = 1\n", "has no function politeness"),
    ],
)
def test_a_file_that_cannot_be_executed_is_named(source: str, message: str) -> None:
    with pytest.raises(CapasError, match=message):
        load_functions([POLITE], {FILE: source})


def test_a_function_that_compose_has_not_copied_is_named() -> None:
    with pytest.raises(CapasError, match=r"data/own/scores\.py has not been copied"):
        load_functions([POLITE], {})


def test_references_without_a_number_are_told_before_anything_is_generated(root: Path) -> None:
    rows = [{**ROW, "reference": "#### 5"}, {**ROW, "id": "r2"}, {**ROW, "id": "r3"}]
    with pytest.raises(CapasError, match=r"test record r2 has no number \('please'; 2 such"):
        scorer(root, "final_number").check(rows)
    scorer(root, "final_number").check(rows[:1])
