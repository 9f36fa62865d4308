"""Classification by likelihood on a tiny workspace: probabilities, reports, and labels that are refused."""

import csv
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import stored
from tiny import (
    _format,
    read_json,
    read_params,
    run_stage,
    write_workspace,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from capas.chat.format import ChatFormat
from capas.chat.recorded import read_chat, recorded_format
from capas.core.errors import CapasError
from capas.core.records import FORMATTED, RAW, read_records, write_records
from capas.evaluation.label_scores import Candidates, ending, log_likelihoods
from capas.evaluation.label_set import MAX_LABELS, LabelSet
from capas.evaluation.names import LABEL_SCORES
from stages import evaluate_model, train_lora

# One begins another, two have accents, and all have several tokens.
LABELS = ["contraseña", "devolución", "tarjeta", "tarjeta perdida"]
QUESTIONS = ("¿Dónde está mi tarjeta?", "He perdido la tarjeta en Málaga", "¿Cómo la devuelvo?")
SPLITS = {"train": 24, "validation": 4, "test": 10}


def write_labelled(root: Path, overrides: tuple[str, ...] = ()) -> Path:
    """The tiny workspace with records whose answers are labels; half of them are `tarjeta`."""
    write_workspace(root, ["evaluation=labels", *overrides])
    chat = recorded_format(root / "data/formatted", root / "data/models/tokenizer")
    for split, count in SPLITS.items():
        records = [_record(f"{split}-{i}", i) for i in range(count)]
        write_records(root / f"data/raw/{split}.parquet", RAW, records)
        formatted = [_format(record, chat) for record in records]
        write_records(root / f"data/formatted/{split}.parquet", FORMATTED, formatted)
    return root


def _record(name: str, number: int) -> dict[str, Any]:
    label = "tarjeta" if number % 2 else LABELS[number // 2 % len(LABELS)]
    messages = [
        {"role": "user", "content": f"{QUESTIONS[number % 3]} {number}"},
        {"role": "assistant", "content": label},
    ]
    return stored({"id": name, "messages": messages, "metadata": json.dumps({"kind": label})})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, without_estimate: None) -> Path:
    root = write_labelled(tmp_path_factory.mktemp("labelled"))
    run_stage("train", train_lora.main, root)
    evaluate(root)
    return root


def evaluate(root: Path) -> None:
    run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
    run_stage("evaluate", partial(evaluate_model.main, "tuned"), root)


@pytest.fixture(scope="module")
def records(evaluated: Path) -> list[dict[str, Any]]:
    return list(read_records(evaluated / "data/formatted/test.parquet", FORMATTED))


@pytest.fixture(scope="module")
def candidates(evaluated: Path, records: list[dict[str, Any]]) -> Candidates:
    folders = evaluated / "data/formatted", evaluated / "data/models/tokenizer"
    return Candidates.read(records, None, *folders)


@pytest.fixture(scope="module")
def base(evaluated: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(evaluated / "data/models/base").eval()


def whole_sequence(model: Any, tokenizer: Any, question: str, label: str) -> float:
    """The log-probability of a label and its end token, in a ChatML conversation written by hand."""
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    start = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([tokenizer(f"{prompt}{label}<|im_end|>").input_ids])
    with torch.inference_mode():
        logs = model(ids).logits[0].double().log_softmax(dim=-1)
    places = range(start, ids.shape[1])
    return math.fsum(float(logs[i - 1, ids[0, i]]) for i in places)


def test_probabilities_are_those_of_whole_sequences(evaluated: Path, base: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(evaluated / "data/models/tokenizer")
    raw = list(read_records(evaluated / "data/raw/test.parquet", RAW))
    rows = pq.read_table(evaluated / "reports/predictions_base.parquet").to_pylist()
    for record, row in zip(raw, rows, strict=True):
        question = record["messages"][0]["content"]
        logs = [whole_sequence(base, tokenizer, question, label) for label in LABELS]
        total = math.log(math.fsum(map(math.exp, logs)))
        expected = [math.exp(log - total) for log in logs]
        found = row["label_probabilities"]
        assert [entry["label"] for entry in found] == LABELS
        assert [entry["probability"] for entry in found] == pytest.approx(expected, rel=1e-4)
        assert row["completion"] == LABELS[expected.index(max(expected))]
        right = expected[LABELS.index(row["reference"])]
        assert row["label_log_loss"] == pytest.approx(-math.log(right), rel=1e-4)
        assert row["label_accuracy"] == (row["completion"] == row["reference"])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_change_no_likelihood(
    batch_size: int, evaluated: Path, base: Any, records: list[Any], candidates: Candidates
) -> None:
    chat = read_chat(evaluated / "data/formatted")
    found = log_likelihoods(base, records, candidates, chat, batch_size)
    once_more = log_likelihoods(base, records, candidates, chat, batch_size)
    together = log_likelihoods(base, records, candidates, chat, 7)
    assert found.shape == (10, 4) and torch.equal(found, once_more)
    assert torch.allclose(found, together, rtol=1e-5)


def test_an_ending_is_the_label_and_its_end_token(
    evaluated: Path, candidates: Candidates, records: list[dict[str, Any]]
) -> None:
    end = read_chat(evaluated / "data/formatted")["end_token_id"]
    short, long = (candidates.endings[LABELS.index(t)][0] for t in ("tarjeta", "tarjeta perdida"))
    assert short[-1] == long[-1] == end and long[: len(short) - 1] == short[:-1]
    assert long[: len(short)] != short  # the end token tells them apart
    first = records[0]
    ids, labels = candidates.endings[LABELS.index(first["reference"])]
    written = slice(len(first["prompt_ids"]), len(first["prompt_ids"]) + len(ids))
    assert (first["input_ids"][written], first["labels"][written]) == (ids, labels)


def test_both_reports_hold_the_scores_of_labels(evaluated: Path) -> None:
    base, report = (
        read_json(evaluated / f"reports/{name}.json") for name in ("evaluation_base", "evaluation")
    )
    assert base["labels"]["names"] == LABELS and base["labels"]["num_train"] == [3, 3, 15, 3]
    assert base["labels"]["origin"] == "the answers of the training split"
    assert sum(map(sum, report["tuned"]["labels"]["confusion"])) == 10
    majority = base["majority"]
    assert majority["label"] == "tarjeta" and majority["train_fraction"] == 15 / 24
    assert majority["label_accuracy"] == 0.6
    assert majority["label_macro_f1"] == pytest.approx(2 * 6 / 16 / 4, rel=1e-5)
    assert base["nearest"].keys() >= {"label_accuracy", "label_macro_f1"}
    assert list(report["difference"]) == [
        *("label_accuracy", "label_balanced_accuracy", "label_macro_f1", "label_log_loss"),
        *("label_calibration_error", "loss"),
    ]
    gain = report["difference"]["label_log_loss"]
    change = report["tuned"]["label_log_loss"] - base["label_log_loss"]
    assert gain["mean"] == pytest.approx(change, rel=1e-3)
    assert report["length_ratio"] is None and report["tuned"]["max_new_tokens"] is None
    assert report["shares"] == [
        *("label_accuracy", "label_balanced_accuracy", "label_macro_f1", "label_calibration_error"),
    ]


def test_metrics_hold_numbers_for_a_sweep(evaluated: Path) -> None:
    flat = read_json(evaluated / "reports/metrics/tuned.json")
    report = read_json(evaluated / "reports/evaluation.json")
    names = ("label_accuracy", *LABEL_SCORES)
    assert {name: flat[name] for name in names} == {name: report["tuned"][name] for name in names}
    assert flat["label_accuracy_gain"] == report["difference"]["label_accuracy"]["mean"]
    assert flat["exact_match"] is None and flat["stop_rate"] is None
    lines = csv.DictReader((evaluated / "reports/before_after.csv").open())
    found = [line["bar"] for line in lines if line["kind"] == "all"]
    assert found == ["all, base", "all, nearest", "all, majority", "all, tuned"]


def test_the_gate_says_what_is_not_measured(evaluated: Path) -> None:
    checks = {
        c["name"]: c for c in read_json(evaluated / "reports/evaluation.json")["gate"]["checks"]
    }
    of_answers = ("stop_rate", "empty_rate", "control_token_rate", "length_ratio_low")
    for name in (*of_answers, "length_ratio_high"):
        assert checks[name]["passed"] is None and checks[name]["unmeasured"] == "not_generated"
    others = [name for name, check in checks.items() if "unmeasured" not in check]
    assert others == [
        *("label_accuracy_gain", "label_accuracy_gain_over_nearest"),
        *("label_balanced_accuracy_gain_over_majority", "noise_floor", "forgetting"),
        "quantization_loss",
    ]
    assert checks["noise_floor"]["value"] is not None


def test_both_models_choose_alone_as_in_batches(evaluated: Path) -> None:
    noise = read_json(evaluated / "reports/evaluation.json")["noise"]
    assert noise["num_records"] == 10
    assert noise["num_changed_answers"] == {"base": 0, "tuned": 0} and noise["noise"] == 0.0


def test_a_second_run_gives_the_same_bytes(evaluated: Path) -> None:
    files = [f"reports/{f}" for f in ("evaluation.json", "predictions.parquet")]
    before = [(evaluated / file).read_bytes() for file in files]
    run_stage("evaluate", partial(evaluate_model.main, "tuned"), evaluated)
    assert [(evaluated / file).read_bytes() for file in files] == before


def test_given_labels_set_the_order(tmp_path: Path) -> None:
    given = ["tarjeta perdida", "tarjeta", "devolución", "contraseña", "fraude"]
    root = write_labelled(tmp_path, (f"evaluation.labels={given}",))
    run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
    found = read_json(root / "reports/evaluation_base.json")["labels"]
    assert found["names"] == given and found["num_train"] == [3, 15, 3, 3, 0]
    assert found["origin"] == "evaluation.labels"
    [first, *_] = pq.read_table(root / "reports/predictions_base.parquet").to_pylist()
    assert [entry["label"] for entry in first["label_probabilities"]] == given


def test_a_label_that_training_lacks_is_an_error(
    evaluated: Path, records: list[dict[str, Any]]
) -> None:
    labels = LabelSet.of(None, ["tarjeta", "contraseña"])
    chat = recorded_format(evaluated / "data/formatted", evaluated / "data/models/tokenizer")
    said = r"test record test-2: the answer 'devolución' is not among the answers of the training split"
    with pytest.raises(CapasError, match=said):
        Candidates.encode(labels, chat).check(records)
    with pytest.raises(
        CapasError, match=r"1 records: the answer 'otra' .* evaluation.labels \('a'"
    ):
        LabelSet.of(["a", "b"], ["a", "b", "otra"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "no label; a classification needs at least two"),
        (["spam", " spam"], r"a single label \('spam'\)"),
        (["spam", " "], "a label is empty"),
        (["nin\u0303o", "ni\u00f1o"], r"'nin\\u0303o' and 'ni\\xf1o' look the same"),
        ([f"answer {i}" for i in range(MAX_LABELS + 1)], "201 distinct texts .* at most 200"),
    ],
)
def test_texts_that_are_no_labels_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(CapasError, match=said):
        LabelSet.of(None, names)


def test_a_given_label_is_named_once() -> None:
    with pytest.raises(CapasError, match=r"evaluation.labels: 'spam' and 'spam' look the same"):
        LabelSet.of(["spam", "ham", "spam "], [])


def test_an_answer_that_is_more_than_its_label_is_refused(
    candidates: Candidates, records: list[dict[str, Any]]
) -> None:
    record = records[0]
    at = len(record["prompt_ids"])
    ids = [*record["input_ids"][:at], 7, *record["input_ids"][at:]]
    with pytest.raises(CapasError, match=r"test-0: its answer is more than its label 'contraseña'"):
        candidates.check([{**record, "input_ids": ids}])


def test_a_record_beyond_the_context_is_refused(
    candidates: Candidates, records: list[dict[str, Any]]
) -> None:
    longest = max(len(record["prompt_ids"]) for record in records) + len("tarjeta perdida") + 1
    candidates.check_length(records, longest)
    candidates.check_length(records, None)
    with pytest.raises(CapasError, match=f"context is {longest - 1} tokens: shorten the prompts"):
        candidates.check_length(records, longest - 1)


def test_labels_that_the_tokenizer_does_not_distinguish_are_refused(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = recorded_format(evaluated / "data/formatted", evaluated / "data/models/tokenizer")
    monkeypatch.setattr("capas.evaluation.label_scores.ending", lambda name, chat: ([1], [1]))
    with pytest.raises(CapasError, match="'a' and 'b' have the same token ids"):
        Candidates.encode(LabelSet(["a", "b"], [1, 1], "x"), chat)


def test_a_label_that_the_template_refuses_is_named(evaluated: Path) -> None:
    chat = recorded_format(evaluated / "data/formatted", evaluated / "data/models/tokenizer")
    with pytest.raises(CapasError, match="the label ' ' cannot be an answer: "):
        ending(" ", chat)


def test_a_broken_model_is_refused(
    evaluated: Path, records: list[dict[str, Any]], candidates: Candidates
) -> None:
    model = AutoModelForCausalLM.from_pretrained(evaluated / "data/models/base")
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    chat = read_chat(evaluated / "data/formatted")
    with pytest.raises(
        CapasError, match="a label of record test-0 has a likelihood that is not fin"
    ):
        log_likelihoods(model, records[:1], candidates, chat, 4)


def test_other_labels_of_the_base_are_refused(evaluated: Path) -> None:
    from capas.evaluation.label_metrics import compare_labels

    report = read_json(evaluated / "reports/evaluation.json")
    base = read_json(evaluated / "reports/evaluation_base.json")
    base["labels"]["names"] = ["a", "b"]
    with pytest.raises(CapasError, match="Run `dvc repro evaluate_base`"):
        compare_labels(report, [], [], base, read_params("evaluate", evaluated))


def test_every_family_ends_a_label_with_its_end_token(tiny_tokenizer_dir: Path) -> None:
    from conftest import template_text

    for family in ("chatml", "llama3", "mistral", "gemma"):
        chat = ChatFormat.load(template_text(family), tiny_tokenizer_dir, "26 Jul 2024")
        ids, labels = ending("devolución", chat)
        assert ids == labels and ids[-1] == chat.end_token_id
        assert chat.decode(ids[:-1]).strip() == "devolución"
