"""Samples of a tiny model: a complete grid, seeds of the prompts' own, tables that hold any text."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stored
from tiny import make_model, read_json, run_stage, write_workspace
from transformers import AutoModelForCausalLM

from capas.core.records import FORMATTED, read_records
from capas.evaluation import decoding, samples
from capas.evaluation.generation import generation_config, next_token_probabilities
from capas.evaluation.prompts import Prompt, first_system_message, held_out_prompts, own_prompts
from stages import sample_outputs, train_lora


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_workspace(tmp_path_factory.mktemp("sampled"))
    run_stage("train", train_lora.main, root)
    run_stage("sample", sample_outputs.main, root)
    return root


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "reports/samples.jsonl").read_text().splitlines()]


def test_grid_is_complete(sampled: Path) -> None:
    """2 prompts x 6 settings x 2 models, and the wrong template once for each prompt and model."""
    rows = lines(sampled)
    right = [row for row in rows if row["template"] == "right"]
    assert len(right) == 24 and len(rows) == 28
    assert {len(row["completions"]) for row in right if row["setting"] == "greedy"} == {1}
    assert {len(row["completions"]) for row in right if row["setting"] != "greedy"} == {2}


def test_summary_names_every_setting(sampled: Path) -> None:
    facts = read_json(sampled / "reports/samples.json")
    assert list(facts["settings"]) == list(dict.fromkeys(row["setting"] for row in lines(sampled)))
    assert facts["settings"]["greedy"]["tuned"] == {
        "distinct_completion_rate": 0.5,
        "score": 0.0,
    }
    assert facts["wrong_template"]["base"]["score"] == 0.0


def test_next_token_before_and_after(sampled: Path) -> None:
    rows = list(csv.DictReader((sampled / "reports/next_token.csv").open()))
    settings = {"unchanged", "low_temperature", "multinomial", "high_temperature", "top_k", "top_p"}
    assert {row["setting"] for row in rows} == settings and len(rows) == 6 * 2 * 8
    tuned = {
        s: [float(r["probability"]) for r in rows if (r["model"], r["setting"]) == ("tuned", s)]
        for s in settings
    }
    assert tuned["unchanged"] == tuned["multinomial"] == sorted(tuned["unchanged"], reverse=True)
    assert tuned["low_temperature"][0] > tuned["unchanged"][0] > tuned["high_temperature"][0]
    assert sum(tuned["top_k"]) == pytest.approx(1) and tuned["top_k"][5:] == [0, 0, 0]


def test_the_losses_of_an_answer_are_those_that_evaluation_averages(sampled: Path) -> None:
    """Token by token, the end token included; their mean is the loss of the whole record."""
    rows = list(csv.DictReader((sampled / "reports/answer_loss.csv").open()))
    record = next(
        record
        for record in read_records(sampled / "data/formatted/test.parquet", FORMATTED)
        if record["id"] == rows[0]["record_id"]
    )
    start, end = decoding.last_trained(record["labels"])
    assert len(rows) == end - start and rows[-1]["token"] == "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(sampled / "data/models/base")
    labels = [-100] * start + record["input_ids"][start:end]
    with torch.inference_mode():
        whole = model(torch.tensor([record["input_ids"][:end]]), labels=torch.tensor([labels])).loss
    base = sum(float(row["base"]) for row in rows) / len(rows)
    assert base == pytest.approx(float(whole), rel=1e-4)
    assert all(float(row["tuned"]) > 0 for row in rows)
    assert [row["tuned"] for row in rows] != [row["base"] for row in rows]


def test_the_last_answer_of_several_is_found() -> None:
    assert decoding.last_trained([-100, 5, 6, -100, -100, 7, 8, -100]) == (5, 7)
    assert decoding.last_trained([5, 6]) == (0, 2)


def test_eager_attention_is_compared_with_sdpa(sampled: Path) -> None:
    facts = read_json(sampled / "reports/attention.json")
    assert (facts["used"], facts["num_sequences"], facts["skipped"]) == ("sdpa", 2, None)
    assert 0 < facts["largest_logit_difference"] < 1e-4
    assert facts["num_same_next_token"] == facts["num_tokens"] > 20


def test_second_run_writes_the_same_bytes(sampled: Path) -> None:
    names = [f"{name}.csv" for name in ("next_token", "answer_loss")]
    names += ["samples.jsonl", "samples.md", "samples.json", "attention.json"]
    before = [(sampled / "reports" / name).read_bytes() for name in names]
    run_stage("sample", sample_outputs.main, sampled)
    assert [(sampled / "reports" / name).read_bytes() for name in names] == before


def test_own_prompts_are_asked_after_the_system_message(sampled: Path, tmp_path: Path) -> None:
    root = write_workspace(tmp_path)
    (root / "data/models/adapter").symlink_to(sampled / "data/models/adapter")
    (root / "data/composed/prompts.json").write_text('{"prompts": ["timer 5"]}')
    run_stage("sample", sample_outputs.main, root)
    assert {row["prompt_id"] for row in lines(root)} == {"own-0"}
    assert {row["reference"] for row in lines(root)} == {None}
    facts = read_json(root / "reports/samples.json")
    assert facts["settings"]["greedy"]["base"]["score"] is None


def test_seed_belongs_to_prompt_and_setting() -> None:
    prompts = own_prompts(["a", "b"], "system")
    seeds = {decoding.seed_of(seed, p, s) for seed in (0, 1) for p in prompts for s in ("x", "y")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_p": 0.5},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.7},
        {"repetition_penalty": 1.3, "top_k": None},
    ],
)
def test_probabilities_are_those_that_generate_draws_from(settings: dict[str, float]) -> None:
    model, ids = make_model(initializer_range=0.3).eval(), torch.tensor([[5, 6, 7]])
    chat = {"bos_token_id": None, "pad_token_id": 256, "stop_token_ids": [258]}
    config = generation_config(chat, 1, do_sample=True, **settings)
    config.output_scores = config.return_dict_in_generate = True
    scores = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    ).scores[0][0]
    with torch.inference_mode():
        mine = next_token_probabilities(model(ids).logits[0, -1], ids[0].tolist(), settings)
    torch.testing.assert_close(mine, scores.softmax(dim=-1))


def test_markdown_cell_holds_whatever_a_model_writes() -> None:
    assert samples.as_cell(["a|b\nc", "a|b\nc", ""]) == r"` a\|b⏎c ` ×2<br>(empty)"
    assert samples.as_code("x `y`") == "`` x `y` ``"
    assert "``" not in samples.as_code("x ``` y")[2:-2], "the model cannot close the fence"


def test_held_out_prompts_are_spread_and_end_with_the_user() -> None:
    turns = [
        {"role": r, "content": r} for r in ("system", "user", "assistant", "user", "assistant")
    ]
    raw = [stored({"id": str(i), "messages": turns}) for i in range(9)]
    found = held_out_prompts(raw, ({"id": str(i)} for i in range(9)), 3)
    assert [prompt.prompt_id for prompt in found] == ["0", "3", "6"]
    assert found[0] == Prompt("0", turns[:4], "assistant")
    assert first_system_message(raw[0]) == "system"


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("word4 word5", "word0 word1 word2 word3 "),
        ("word4", "word0 word1 word2 word3 "),  # truncated after it
        ("WORD4 word5", "word0 word1 word2 word3 "),  # as a tokenizer that normalizes decodes it
        ("", "word0 word1 word2 word3 word4 word5"),
    ],
)
def test_a_plain_text_is_cut_where_the_evaluation_cuts_it(reference: str, shown: str) -> None:
    text = " ".join(f"word{i}" for i in range(6))
    raw = [stored({"id": "a", "messages": [{"role": "text", "content": text}]})]
    formatted = {"id": "a", "prompt_ids": [1, 5, 7], "reference": reference}
    (prompt,) = held_out_prompts(raw, [formatted], 1)
    assert prompt == Prompt("a", [{"role": "text", "content": shown}], reference, None, [1, 5, 7])


def test_a_request_of_ones_own_is_the_beginning_of_a_text() -> None:
    assert own_prompts(["Once"], "system", "text")[0].messages == [
        {"role": "text", "content": "Once"}
    ]
