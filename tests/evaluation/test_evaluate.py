"""Evaluation of base and tuned model on the test split of a tiny workspace."""

import csv
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tiny import read_json, read_params, run_stage, write_workspace
from tokenizers import Tokenizer

from capas.chat.recorded import read_chat, recorded_format
from capas.core.errors import CapasError
from capas.core.records import evenly_spaced
from capas.evaluation import asking, gate, score_model
from capas.evaluation.answer_length import answer_limit
from capas.evaluation.difference import in_words
from capas.evaluation.general import format_questions
from capas.evaluation.predictions import read_base
from capas.models.loading import attach_adapter, load_model
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
    rates = {"min_stop_rate": 0.9, "max_empty_rate": 0.01, "max_control_token_rate": 0.0}
    limits = {**rates, "max_quantization_loss": 0.5, "max_forgetting": 1.0}
    limits |= {"min_length_ratio": 0.5, "max_length_ratio": 2.0, "min_gain_to_noise": 1.0}
    assert report["gate"] == gate.judge(base, report, limits)
    assert [check["name"] for check in report["gate"]["checks"]] == [
        *("exact_match_gain", "exact_match_gain_over_nearest", "noise_floor", "stop_rate"),
        *("empty_rate", "control_token_rate", "length_ratio_low", "length_ratio_high"),
        *("forgetting", "quantization_loss"),
    ]
    assert report["gate"]["checks"][3]["value"] == report["tuned"]["stop_rate"]


def test_both_models_answer_alone_as_in_batches(evaluated: Path) -> None:
    report = read_json(evaluated / "reports/evaluation.json")
    assert report["noise"]["num_records"] == 10
    assert report["noise"]["num_changed_answers"] == {"base": 0, "tuned": 0}
    base, alone = (
        {row["id"]: row for row in pq.read_table(evaluated / f"reports/{name}.parquet").to_pylist()}
        for name in ("predictions_base", "predictions_base_alone")
    )
    assert len(base) == len(alone) == 10
    assert {i: row["completion"] for i, row in alone.items()} == {
        i: row["completion"] for i, row in base.items()
    }
    assert report["noise"]["noise"] == 0.0
    checks = {check["name"]: check for check in report["gate"]["checks"]}
    assert checks["forgetting"]["value"] == report["general"]["difference"]["high"]
    assert checks["length_ratio_high"]["value"] == report["length_ratio"]["high"]


def test_the_verdict_is_that_of_the_interval(evaluated: Path) -> None:
    report = read_json(evaluated / "reports/evaluation.json")
    assert list(report["difference"]) == ["exact_match", "valid_json", "loss"]
    assert report["metrics"] == report["shares"] == ["exact_match", "valid_json"]
    loss, match = report["difference"]["loss"], report["difference"]["exact_match"]
    assert (loss["verdict"], match["verdict"]) == ("better", "no difference seen")
    assert loss["num_records_needed"] >= 2 and match["num_records_needed"] is None
    assert report["power_fraction"] == 0.8


def test_what_was_forgotten_is_the_loss_on_general_questions(evaluated: Path) -> None:
    """The adapter switched off is the base as it was loaded."""
    found = read_json(evaluated / "reports/evaluation.json")["general"]
    rows = [losses(evaluated, "base", adapted) for adapted in (False, True)]
    means = [sum(r["loss"] * r["num_supervised_tokens"] for r in side) for side in rows]
    tokens = sum(r["num_supervised_tokens"] for r in rows[0])
    assert found["num_records"] == len(rows[0]) == 40
    assert found["base"]["loss"] == pytest.approx(means[0] / tokens, rel=1e-5)
    assert found["tuned"]["loss"] == pytest.approx(means[1] / tokens, rel=1e-5)
    assert found["difference"]["mean"] == pytest.approx((means[1] - means[0]) / tokens, rel=1e-3)
    assert found["base"]["loss"] != found["tuned"]["loss"]


def losses(root: Path, name: str, adapted: bool) -> list[dict[str, Any]]:
    params = read_params("evaluate", root)
    model = load_model(root / f"data/models/{name}", params.model, torch.device("cpu"))
    if adapted:
        model = attach_adapter(model, root / "data/models/adapter")
    chat = recorded_format(root / "data/formatted", root / "data/models/tokenizer")
    records = format_questions(root / "data/general/records.jsonl", chat)
    batch_size = params.evaluation.batch_size
    return score_model.score(model, records, read_chat(root / "data/formatted"), batch_size)


OWN = """
def brevity(completion, reference, record):
    assert record["prompt"].endswith("<|im_start|>assistant\\n") and record["metadata"]["kind"]
    return len(completion) / len(reference)
"""


def test_other_metrics_stand_in_columns_reports_and_log(
    evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = ["conf/x.py:brevity", "rougeL", "json_fields"]
    root = write_workspace(tmp_path, [f"evaluation.metrics=[{','.join(metrics)}]"])
    composed = root / "data/composed/metrics.json"
    composed.write_text(json.dumps({"sources": {"conf/x.py": OWN}}))
    (root / "data/models/adapter").symlink_to(evaluated / "data/models/adapter")
    with caplog.at_level("INFO", logger="capas"):
        run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
        run_stage("evaluate", partial(evaluate_model.main, "tuned"), root)
    report = read_json(root / "reports/evaluation.json")
    rows = pq.read_table(root / "reports/predictions.parquet").to_pylist()
    for name in ("brevity", "rougeL", "json_fields"):
        assert report["tuned"][name] == pytest.approx(sum(r[name] for r in rows) / 10, rel=1e-5)
        assert report["tuned"]["by"]["kind"]["seen"].keys() >= {name}
    assert rows[0]["brevity"] == len(rows[0]["completion"]) / len(rows[0]["reference"])
    assert report["metrics"][0] == "brevity"
    assert report["gate"]["checks"][0]["name"] == "brevity_gain"
    flat = read_json(root / "reports/metrics/tuned.json")
    assert flat["brevity_gain"] == report["difference"]["brevity"]["mean"]
    assert flat["exact_match"] is None and "rougeL_gain" not in flat
    lines = list(csv.DictReader((root / "reports/before_after.csv").open()))
    assert {line["metric"] for line in lines} == {"brevity"}
    assert re.search(r"brevity [+-]\S+ \(\S+ to \S+\): (better|worse|no difference)", caplog.text)
    assert re.search(r"seconds per record: about \d+ seconds for 10", caplog.text)


def test_the_loss_alone_has_a_verdict_and_no_bars_for_kinds(
    evaluated: Path, tmp_path: Path
) -> None:
    root = write_workspace(tmp_path, ["evaluation=loss"])
    (root / "data/models/adapter").symlink_to(evaluated / "data/models/adapter")
    run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
    run_stage("evaluate", partial(evaluate_model.main, "tuned"), root)
    report = read_json(root / "reports/evaluation.json")
    assert report["metrics"] == [] and report["difference"]["loss"]["verdict"] == "better"
    assert report["length_ratio"] is None and "noise" not in report
    lines = list(csv.DictReader((root / "reports/before_after.csv").open()))
    assert [(line["bar"], line["metric"]) for line in lines] == [
        ("all, base", "loss"),
        ("all, tuned", "loss"),
    ]


def test_a_base_that_was_scored_by_other_metrics_is_refused(evaluated: Path) -> None:
    file = evaluated / "reports/predictions_base.parquet"
    names, rows = ["exact_match", "valid_json"], pq.read_table(file, columns=["id"]).to_pylist()
    assert len(read_base(file, names, rows)) == 10
    with pytest.raises(CapasError, match=r"other records \(10\) than the tuned model \(9\): "):
        read_base(file, names, rows[1:])
    assert [r["id"] for r in read_base(file, names, rows[1:], of_more=True)] == [
        row["id"] for row in rows[1:]
    ]
    with pytest.raises(CapasError, match="has other records"):
        read_base(file, names, [*rows, {"id": "further"}], of_more=True)
    with pytest.raises(CapasError, match=r"\(chrf, valid_json\)\. Run `dvc repro evaluate_base`"):
        read_base(file, ["exact_match", "chrf"], rows)
    with pytest.raises(CapasError, match="their order"):
        read_base(file, ["valid_json", "exact_match"], rows)


def test_a_difference_of_that_size_in_words() -> None:
    found = {"mean": 0.25, "low": 0.1, "high": 0.4, "verdict": "better", "num_records_needed": 12}
    assert in_words("chrf", found) == (
        "chrf +0.25 (+0.1 to +0.4): better; 12 records would show a difference of that size"
    )


def test_groups_add_up(evaluated: Path) -> None:
    facts = read_json(evaluated / "reports/evaluation.json")["tuned"]
    assert set(facts["by"]) == {"kind", "language", "function", "turns", "distance"}
    for groups in facts["by"].values():
        assert sum(group["num_records"] for group in groups.values()) == facts["num_records"] == 10


def test_before_after_has_a_row_for_each_kind_and_model(evaluated: Path) -> None:
    rows = list(csv.DictReader((evaluated / "reports/before_after.csv").open()))
    pairs = [(row["kind"], row["model"]) for row in rows]
    assert pairs[:3] == [("all", "base"), ("all", "nearest"), ("all", "tuned")] and len(pairs) == 9


def test_the_answers_of_the_most_similar_training_records_are_scored(evaluated: Path) -> None:
    rows = pq.read_table(evaluated / "reports/predictions_nearest.parquet").to_pylist()
    asked = {
        r["id"]: r["messages"]
        for r in pq.read_table(evaluated / "data/raw/train.parquet").to_pylist()
    }
    for row in rows:
        assert asked[row["nearest_id"]][1]["content"] == row["completion"]
        assert row["exact_match"] == (row["completion"] == row["reference"])
        assert 0 < row["similarity"] <= 1
    base = read_json(evaluated / "reports/evaluation_base.json")["nearest"]
    assert base["num_records"] == 10
    assert base["exact_match"] == sum(row["exact_match"] for row in rows) / 10
    assert base["copied_value_rate"] == sum(row["copied_values"] for row in rows) / 10
    over = read_json(evaluated / "reports/evaluation.json")["difference_to_nearest"]["exact_match"]
    tuned = read_json(evaluated / "reports/evaluation.json")["tuned"]["exact_match"]
    assert over["mean"] == pytest.approx(tuned - base["exact_match"])


def test_an_answer_may_be_as_long_as_the_references_suggest(tmp_path: Path) -> None:
    root = write_workspace(tmp_path, ["evaluation.max_new_tokens=null"])
    records = pq.read_table(root / "data/formatted/test.parquet").to_pylist()
    longest = max(len(r["input_ids"]) - len(r["prompt_ids"]) for r in records)
    assert answer_limit(records, None) == longest + max(8, longest // 4)
    assert answer_limit(records, 5) == 5
    run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
    facts = read_json(root / "reports/evaluation_base.json")
    assert facts["max_new_tokens"] == answer_limit(records, None)


def test_a_control_token_in_an_answer_is_counted_and_fails_the_gate(evaluated: Path) -> None:
    tokenizer = Tokenizer.from_file(str(evaluated / "data/models/tokenizer/tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|eot_id|>")}
    found = score_model.control_ids({"allowed_tokens": ["<|eot_id|>"]}, tokenizer)
    assert ids["<|im_start|>"] in found and ids["<|eot_id|>"] not in found
    report = read_json(evaluated / "reports/evaluation.json")
    report["tuned"]["control_token_rate"] = 0.1
    base = read_json(evaluated / "reports/evaluation_base.json")
    judged = gate.judge(base, report, read_params("evaluate", evaluated).evaluation.gate)
    assert any("control_token_rate 0.1 is above" in reason for reason in judged["reasons"])


def test_prompt_of_another_format_is_refused(evaluated: Path) -> None:
    record = {"id": "test-0", "prompt_ids": [1, 2, 5], "input_ids": [1, 3, 5, 4]}
    with pytest.raises(CapasError, match=r"test-0: prompt_ids is not a prefix of input_ids"):
        asking.check_prompts([record], "test")


def test_chosen_records_are_spread_over_the_split() -> None:
    records = [{"id": str(i)} for i in range(10)]
    assert [r["id"] for r in evenly_spaced(records, 4)] == ["0", "2", "5", "7"]
    assert evenly_spaced(records, 99) == records


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
