"""Evaluation of base and tuned model on the test split of a tiny workspace."""

import csv
import math
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import read_json, run_stage, write_workspace

from capas import gate
from capas.errors import CapasError
from stages import evaluate_model, train_lora


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_workspace(tmp_path_factory.mktemp("evaluated"))
    run_stage("train", train_lora.main, root)
    run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
    run_stage("evaluate", partial(evaluate_model.main, "tuned"), root)
    return root


def test_loss_is_the_mean_over_supervised_tokens(evaluated: Path) -> None:
    rows = pq.read_table(evaluated / "reports/predictions_base.parquet").to_pylist()
    facts = read_json(evaluated / "reports/evaluation_base.json")
    tokens = sum(row["num_supervised_tokens"] for row in rows)
    expected = sum(row["loss"] * row["num_supervised_tokens"] for row in rows) / tokens
    assert facts["loss"] == pytest.approx(expected, rel=1e-5)
    assert facts["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_unquantized_base_is_the_full_precision_base(evaluated: Path) -> None:
    facts = read_json(evaluated / "reports/evaluation_base.json")
    assert facts["full_precision"] == {name: facts[name] for name in ("loss", "perplexity")}


def test_training_shows_in_the_difference(evaluated: Path) -> None:
    base, tuned = (
        read_json(evaluated / f"reports/{name}.json") for name in ("evaluation_base", "evaluation")
    )
    loss = tuned["difference"]["loss"]
    assert loss["mean"] == pytest.approx(tuned["tuned"]["loss"] - base["loss"], rel=1e-3)
    assert loss["low"] <= loss["mean"] <= loss["high"] < 0
    assert tuned["bootstrap_resamples"] == 100


def test_the_gate_judges_the_tuned_model(evaluated: Path) -> None:
    report = read_json(evaluated / "reports/evaluation.json")
    base = read_json(evaluated / "reports/evaluation_base.json")
    limits = {"min_stop_rate": 0.9, "max_empty_rate": 0.01, "max_quantization_loss": 0.5}
    assert report["gate"] == gate.judge(base, report, limits)
    assert [check["name"] for check in report["gate"]["checks"]] == [
        *("exact_match_gain", "stop_rate", "empty_rate", "quantization_loss")
    ]
    assert report["gate"]["checks"][1]["value"] == report["tuned"]["stop_rate"]


def test_groups_add_up(evaluated: Path) -> None:
    facts = read_json(evaluated / "reports/evaluation.json")["tuned"]
    assert set(facts["by"]) == {"kind", "language", "function", "turns"}
    for groups in facts["by"].values():
        assert sum(group["num_records"] for group in groups.values()) == facts["num_records"] == 10


def test_before_after_has_a_row_for_each_kind_and_model(evaluated: Path) -> None:
    rows = list(csv.DictReader((evaluated / "reports/before_after.csv").open()))
    pairs = [(row["kind"], row["model"]) for row in rows]
    assert pairs[:2] == [("all", "base"), ("all", "tuned")] and len(pairs) == 6


def test_prompt_of_another_format_is_refused(evaluated: Path) -> None:
    record = {"id": "test-0", "prompt_ids": [1, 2, 5], "input_ids": [1, 3, 5, 4]}
    with pytest.raises(CapasError, match=r"test-0: prompt_ids is not how input_ids begins"):
        evaluate_model.check_prompts([record])


def test_chosen_records_are_spread_over_the_split() -> None:
    records = [{"id": str(i)} for i in range(10)]
    assert [r["id"] for r in evaluate_model.choose(records, 4)] == ["0", "2", "5", "7"]
    assert evaluate_model.choose(records, None) == records == evaluate_model.choose(records, 99)


def test_loss_alone_generates_nothing(tmp_path: Path) -> None:
    root = write_workspace(tmp_path, ["evaluation=loss"])
    run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
    facts = read_json(root / "reports/evaluation_base.json")
    assert facts["loss"] > 0
    assert (facts["stop_rate"], facts["empty_rate"]) == (None, None)
    assert not {"exact_match", "valid_json"} & set(facts)
    assert read_json(root / "reports/metrics/base.json")["base"]["exact_match"] is None
    rows = pq.read_table(root / "reports/predictions_base.parquet")
    assert rows["completion"].null_count == rows["stopped"].null_count == len(rows) == 10
    assert not {"exact_match", "valid_json"} & set(rows.column_names)
