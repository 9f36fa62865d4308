"""Let base and tuned model answer the same prompts over a grid of decoding settings.

Reads   data/composed, data/formatted, data/models/adapter, data/models/quantized, data/models/tokenizer,
        data/raw (test)
Writes  reports/samples.jsonl, reports/samples.md, reports/samples.json, reports/next_token.csv,
        reports/answer_loss.csv, reports/attention.json
Params  evaluation.metrics, generation, hardware, model

The travelling record at its end, in samples.jsonl:

    {"prompt_id": ..., "setting": "greedy", "model": "base", "completions": ["Okay, 99 minutes from now."]}
    {"prompt_id": ..., "setting": "greedy", "model": "tuned", "completions": ["{\\"name\\": ...}"]}
"""

import itertools
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from capas.chat.recorded import load_tokenizer, read_chat, recorded_format
from capas.chat.template import Template
from capas.chat.tokenizer import TokenizerFiles
from capas.core.files import read_json, write_csv, write_json
from capas.core.params import Params
from capas.core.progress import doing
from capas.core.records import FORMATTED, RAW, TEXT, read_records
from capas.core.stage import Stage, log, run
from capas.evaluation.answer_length import answer_limit
from capas.evaluation.decoding import MODELS, Models
from capas.evaluation.names import of_answers
from capas.evaluation.predictions import Row
from capas.evaluation.prompts import (
    Prompt,
    first_system_message,
    held_out_prompts,
    own_prompts,
)
from capas.evaluation.samples import summarize, to_markdown
from capas.evaluation.scorer import Scorer
from capas.evaluation.wrong_template import ask_wrongly
from capas.models import hardware
from capas.models.vocabulary import check_ids

COMPOSED, DATA, TOKENIZER = "data/composed", "data/formatted", "data/models/tokenizer"
COLUMNS = ("setting", "model", "token", "probability")  # of reports/next_token.csv
LOSS_COLUMNS = ("record_id", "token", *MODELS)  # of reports/answer_loss.csv


def main(params: Params, stage: Stage) -> None:
    device = hardware.prepare(params.hardware)  # before torch is imported
    stage.costs |= hardware.machine()
    from capas.models.loading import TunedModel, load_model

    chat = read_chat(stage.dep(DATA))
    right = recorded_format(stage.dep(DATA), stage.dep(TOKENIZER))
    prompts = choose_prompts(params.generation, stage)
    quantized = stage.dep("data/models/quantized")
    prompt_ids = [p.input_ids or right.prompt_ids(p.messages, p.tools) for p in prompts]
    check_ids(prompt_ids, (chat["pad_token_id"],), quantized, stage.dep(TOKENIZER))
    load_base = partial(load_model, quantized, params.model, device)
    tuned = TunedModel(stage.dep("data/models/adapter"), params.model, device, load_base)
    limit = answer_limit(test_records(stage), params.generation.max_new_tokens)
    models = Models(tuned, chat, load_tokenizer(stage.dep(TOKENIZER)), params.generation, limit)

    settings, rows = list(params.generation.settings), []
    with doing("prompts and settings", len(prompts) * len(settings) * len(MODELS)) as answered:
        pairs = zip(prompts, prompt_ids, strict=True)
        for (prompt, ids), setting, which in itertools.product(pairs, settings, MODELS):
            rows.append(models.ask(which, prompt, ids, setting))
            answered.step()
    wrong_rows = list(ask_in_wrong_template(models, prompts, params, stage))
    place, probabilities = models.look_inside(prompts[0], prompt_ids[0])
    losses = models.losses(record) if (record := record_of(prompts[0], stage)) else []

    write_lines(rows + wrong_rows, stage)
    scorer = Scorer(of_answers(params.evaluation.metrics), stage.dep(f"{COMPOSED}/metrics.json"))
    questions = {p.prompt_id: p.messages[-1]["content"] for p in prompts}
    facts = summarize(rows, wrong_rows, place, params.generation, scorer, questions)
    write_json(stage.out("reports/samples.json"), facts)
    write_csv(stage.out("reports/next_token.csv"), COLUMNS, probabilities)
    write_csv(stage.out("reports/answer_loss.csv"), LOSS_COLUMNS, losses)
    stage.out("reports/samples.md").write_text(
        to_markdown(prompts, rows + wrong_rows), encoding="utf-8"
    )
    compare_attention(tuned.model, prompt_ids, stage)
    log.info("%d prompts, %d settings", len(prompts), len(params.generation.settings))


def compare_attention(model: Any, sequences: list[list[int]], stage: Stage) -> None:
    """Write how far the tuned model's logits differ between eager attention and sdpa, and log the seconds."""
    from capas.evaluation import attention

    found = attention.compare(model, sequences)
    write_json(stage.out("reports/attention.json"), found.facts)
    if found.facts["skipped"]:
        log.info("eager attention and sdpa are not compared: %s", found.facts["skipped"])
        return
    stage.costs["attention_seconds"] = found.seconds
    log.info(
        "eager attention and sdpa: the largest difference of a logit is %.2g, in %.3f and %.3f seconds",
        found.facts["largest_logit_difference"], *found.seconds.values(),
    )  # fmt: skip


def choose_prompts(generation: Params, stage: Stage) -> list[Prompt]:
    """Return the user's own requests if there are some, otherwise records of the test split."""
    requests = read_json(stage.dep(f"{COMPOSED}/prompts.json"))["prompts"]
    raw = read_records(stage.dep("data/raw") / "test.parquet", RAW)
    if requests:
        first = next(raw)
        system = first_system_message(first) if generation.system is None else generation.system
        is_text = first["messages"][0]["role"] == TEXT
        return own_prompts(requests, system, TEXT if is_text else "user")
    return held_out_prompts(raw, test_records(stage), generation.num_prompts)


def ask_in_wrong_template(
    models: Models, prompts: list[Prompt], params: Params, stage: Stage
) -> Iterator[Row]:
    """Yield the answers under the first setting in generation.wrong_chat_template, if one is named."""
    name, file = params.generation.wrong_chat_template, f"{COMPOSED}/wrong_chat_template.jinja"
    if name is None:
        return
    files, text = TokenizerFiles(stage.dep(TOKENIZER)), stage.dep(file).read_text(encoding="utf-8")
    called = f"the wrong chat template ({name})"
    wrong = Template(text, files.named, models.chat["date_string"], called)
    yield from ask_wrongly(models, prompts, wrong, files)


def record_of(prompt: Prompt, stage: Stage) -> Row | None:
    """Return the formatted test record of a prompt, None for a request of the user's own."""
    return next((r for r in test_records(stage) if r["id"] == prompt.prompt_id), None)


def test_records(stage: Stage) -> Iterator[Row]:
    return read_records(stage.dep(DATA) / "test.parquet", FORMATTED)


def write_lines(rows: list[Row], stage: Stage) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    stage.out("reports/samples.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    run("sample", main)
