"""Score the base or the tuned model on the test split.

    python stages/evaluate_model.py base     before any training: once per data, template and quantization
    python stages/evaluate_model.py tuned    with the adapter, and the difference to the base

Reads   data/formatted (test), data/models/quantized, data/models/tokenizer, data/composed/metrics.json;
        base: data/models/base, data/raw and data/formatted (train), for the answers to copy;
        tuned: data/models/adapter, data/general, data/composed/harness.json and the outputs of base
        evaluation=labels: the answers of data/formatted (train), which are the labels
Writes  base: reports/evaluation_base.json, reports/predictions_{base,base_alone,nearest}.parquet
        tuned: reports/evaluation.json, reports/predictions.parquet, reports/before_after.csv
Params  evaluation (base: the keys that score one model), hardware, model.attn_implementation,
        model.dtype, model.trust_remote_code

A row of predictions: prompt "<|im_start|>user\\nset a timer for 99 minutes<|im_end|>\\n<|im_start|>assistant
\\n", reference '{"name": "set_timer", "arguments": {"minutes": 99}}', completion, loss, exact_match, ...
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from capas.chat.recorded import load_tokenizer, read_chat, recorded_format
from capas.core.files import read_json, write_csv, write_json
from capas.core.params import Params
from capas.core.records import FORMATTED, evenly_spaced, read_records, write_records
from capas.core.stage import Stage, log, run
from capas.evaluation import gate, harness, noise
from capas.evaluation.asking import ask
from capas.evaluation.copying import copy_nearest
from capas.evaluation.difference import compare, difference, gains, in_words
from capas.evaluation.general import format_questions
from capas.evaluation.held_out import HeldOut
from capas.evaluation.label_metrics import compare_labels, label_baselines
from capas.evaluation.label_scores import Candidates
from capas.evaluation.label_set import shown
from capas.evaluation.names import compares_labels, headline
from capas.evaluation.nearest import distance_group
from capas.evaluation.predictions import (
    Row,
    copies_schema,
    predictions_schema,
    read_base,
    read_copies,
)
from capas.evaluation.score_model import score
from capas.evaluation.scorer import Scorer
from capas.evaluation.summary import before_after, side_by_side, summarize, summarize_copies
from capas.models import hardware
from capas.models.vocabulary import check_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from capas.models.loading import TunedModel

DATA, RAW, TOKENIZER = "data/formatted", "data/raw", "data/models/tokenizer"
BASE, QUANTIZED, ADAPTER = "data/models/base", "data/models/quantized", "data/models/adapter"
NEAREST, ALONE = "reports/predictions_nearest.parquet", "reports/predictions_base_alone.parquet"


@dataclass(frozen=True)
class Scored:
    """One model's rows and their summary. `copies` are the answers of the nearest training records."""

    rows: list[Row]
    copies: list[Row]
    facts: dict[str, Any]
    names: list[str]  # names of the metrics
    distances: dict[str, str]  # {id: twin, near or far}


def main(which: Literal["base", "tuned"], params: Params, stage: Stage) -> None:
    device = hardware.prepare(params.hardware)  # before torch is imported
    stage.costs |= hardware.machine()
    from capas.models.loading import TunedModel, load_model, quantization_method

    scorer = Scorer(params.evaluation.metrics, stage.dep("data/composed/metrics.json"))
    held_out = read_test_records(params, scorer, stage)
    load_base = partial(load_model, stage.dep(QUANTIZED), params.model, device)
    if which == "base":
        model = load_base()
        scored = evaluate(which, model, held_out, params, stage)
        alone = answer_alone(model, scored.rows, held_out, params)
        write_records(stage.out(ALONE), predictions_schema(scored.names), alone)
        is_quantized = quantization_method(model) != "none"
        del model  # one model in memory at a time
        records = held_out.records
        full = score_unquantized(records, params, device, stage) if is_quantized else scored.facts
        report_base(scored, full, held_out, stage)
    else:
        tuned = TunedModel(stage.dep(ADAPTER), params.model, device, load_base)
        scored = evaluate(which, tuned.model, held_out, params, stage)
        report_difference(tuned, scored, held_out, params, stage)


def read_test_records(params: Params, scorer: Scorer, stage: Stage) -> HeldOut:
    """Read the formatted test split, at most evaluation.max_records of it, and check it.

    Raises:
        CapasError: the model has no embedding row for a token, a prompt is not the beginning of its record,
            a metric cannot score the records, or an answer is none of the labels.
    """
    records = list(read_records(stage.dep(DATA) / "test.parquet", FORMATTED))
    if params.evaluation.max_records is not None:
        records = evenly_spaced(records, params.evaluation.max_records)
    chat, tokenizer = read_chat(stage.dep(DATA)), load_tokenizer(stage.dep(TOKENIZER))
    ids = [record[name] for record in records for name in ("input_ids", "prompt_ids")]
    candidates = None
    if compares_labels(scorer.names):
        folders = stage.dep(DATA), stage.dep(TOKENIZER)
        candidates = Candidates.read(records, params.evaluation.labels, *folders)
        log.info("%d labels, from %s", len(candidates.endings), candidates.labels.origin)
        if untested := candidates.labels.without(record["reference"] for record in records):
            log.warning("labels that no test record has: %s", shown(untested))
        ids += [ending for ending, _ in candidates.endings]
    check_ids(ids, (chat["pad_token_id"],), stage.dep(QUANTIZED), stage.dep(TOKENIZER))
    if scorer.names:
        records = ask(records, scorer, tokenizer)
    return HeldOut(records, scorer, candidates, chat, tokenizer, params.evaluation.max_new_tokens)


def evaluate(which: str, model: Any, held_out: HeldOut, params: Params, stage: Stage) -> Scored:
    """Score a model's loss and its answers, and add the copied answers."""
    records, names = held_out.records, held_out.scorer.names
    batch_size = params.evaluation.batch_size
    rows = score(model, records, held_out.chat, batch_size)
    rows = held_out.answered(model, rows, batch_size)
    if which == "base":
        copies = copy_nearest(records, held_out.scorer, stage.dep(DATA), stage.dep(RAW))
    else:
        copies = read_copies(stage.dep(NEAREST))
    distances = {row["id"]: distance_group(row["similarity"]) for row in copies}
    facts = held_out.summary(rows, distances)
    shown = {name: facts[name] for name in ("loss", *names)}
    log.info("%s: %s", which, ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    return Scored(rows, copies, facts, names, distances)


def score_unquantized(
    records: list[Row], params: Params, device: "torch.device", stage: Stage
) -> dict[str, Any] | None:
    """Return the loss of the base in full precision, None if the base came quantized."""
    from capas.models.loading import load_model, quantization_method

    model = load_model(stage.dep(BASE), params.model, device)
    if quantization_method(model) != "none":
        return None
    rows = score(model, records, read_chat(stage.dep(DATA)), params.evaluation.batch_size)
    return summarize(rows, [])


def report_base(
    scored: Scored, full: dict[str, Any] | None, held_out: HeldOut, stage: Stage
) -> None:
    """Write the scores of the base, and those of copying the nearest training answer."""
    names = scored.names
    facts = {
        **scored.facts,
        "nearest": summarize_copies(scored.copies, names, scored.distances),
        "full_precision": full and {name: full[name] for name in ("loss", "perplexity")},
    }
    if held_out.candidates is not None:
        facts = label_baselines(facts, scored.copies, held_out.candidates.labels)
    write_json(stage.out("reports/evaluation_base.json"), facts)
    # Under a key of their own, so that `dvc exp show` calls the tuned model's `loss` and not FILE:loss.
    write_json(stage.out("reports/metrics/base.json"), {"base": side_by_side(facts, names)})
    schema = predictions_schema(names)
    write_records(stage.out("reports/predictions_base.parquet"), schema, scored.rows)
    write_records(stage.out(NEAREST), copies_schema(names), scored.copies)


def report_difference(
    tuned: "TunedModel", scored: Scored, held_out: HeldOut, params: Params, stage: Stage
) -> None:
    """Write what the tuned model gained over the base, what it forgot, and the verdict of the gate."""
    rows, facts, names = scored.rows, scored.facts, scored.names
    before = read_base(stage.dep("reports/predictions_base.parquet"), names, rows)
    base = read_json(stage.dep("reports/evaluation_base.json"))
    report = compare(before, rows, facts, names, params)
    if held_out.candidates is not None:
        report = compare_labels(report, before, rows, base, params)
    report["difference_to_nearest"] = {
        name: difference(scored.copies, rows, name, params) for name in names if scored.copies
    }
    report["general"] = ask_generally(tuned, params, stage)
    if params.evaluation.harness.tasks:
        report["harness"] = ask_harness(tuned, params, stage)
    if alone := answer_alone(tuned.model, rows, held_out, params):
        chosen = noise.choose(len(rows), len(alone))
        batched = {"base": [before[i] for i in chosen], "tuned": [rows[i] for i in chosen]}
        answers = {"base": read_base(stage.dep(ALONE), names, alone, of_more=True), "tuned": alone}
        report["noise"] = noise.batching_noise(batched, answers, headline(names), len(rows), params)
    report["gate"] = gate.judge(base, report, params.evaluation.gate)
    log_report(report)
    write_json(stage.out("reports/evaluation.json"), report)
    flat = side_by_side(facts, names) | gains(report)
    write_json(stage.out("reports/metrics/tuned.json"), flat)
    write_records(stage.out("reports/predictions.parquet"), predictions_schema(names), rows)
    models = {name: base.get(name) for name in ("nearest", "majority")}
    models = {"base": base, **models, "tuned": facts}
    bars = before_after({k: v for k, v in models.items() if v}, headline(names))
    columns = ("kind", "model", "bar", "metric", "score")
    write_csv(stage.out("reports/before_after.csv"), columns, bars)


def answer_alone(
    model: "PreTrainedModel", rows: list[Row], held_out: HeldOut, params: Params
) -> list[Row]:
    """Let the model answer a few records once more, one by one; return their rows, none without metrics."""
    if not held_out.scorer.names or params.evaluation.noise_records is None:
        return []
    chosen = noise.choose(len(rows), params.evaluation.noise_records)
    return held_out.answered(model, [rows[i] for i in chosen], 1, chosen)


def log_report(report: dict[str, Any]) -> None:
    """Log each difference with its interval, and the verdict of the gate."""
    changes = {**report["difference"], "loss on general questions": report["general"]["difference"]}
    for name, change in report["difference_to_nearest"].items():
        changes[f"{name} over copying the nearest training answer"] = change
    for name, change in report.get("difference_to_majority", {}).items():
        changes[f"{name} over {gate.BASELINES[gate.MAJORITY]}"] = change
    for name, change in changes.items():
        log.info("%s", in_words(name, change))
    if "noise" in report:
        log.info("batching alone may change the gain by %.4g", report["noise"]["noise"])
    log.info("gate %s", gate.verdict(report["gate"]))


def ask_generally(tuned: "TunedModel", params: Params, stage: Stage) -> dict[str, Any]:
    """Return the losses of base and tuned model on general questions, which show what the model forgot."""
    chat_format = recorded_format(stage.dep(DATA), stage.dep(TOKENIZER))
    records = format_questions(stage.dep("data/general/records.jsonl"), chat_format)
    chat, batch_size = read_chat(stage.dep(DATA)), params.evaluation.batch_size
    with tuned.base() as model:
        before = score(model, records, chat, batch_size)
    after = score(tuned.model, records, chat, batch_size)
    losses = {
        which: {name: facts[name] for name in ("loss", "perplexity")}
        for which, rows in (("base", before), ("tuned", after))
        for facts in [summarize(rows, [])]
    }
    change = difference(before, after, "loss", params)
    return {"num_records": len(records), **losses, "difference": change}


def ask_harness(tuned: "TunedModel", params: Params, stage: Stage) -> dict[str, Any]:
    """Run tasks of the lm-evaluation-harness on base and tuned model, and log their scores."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stage.dep(TOKENIZER))
    tokenizer.chat_template = (stage.dep(DATA) / "chat_template.jinja").read_text(encoding="utf-8")
    settings, composed = params.evaluation, stage.dep("data/composed/harness.json")
    found = harness.evaluate(
        tuned, tokenizer, settings.harness, composed, settings.batch_size, settings.seed
    )
    for task, facts in found["tasks"].items():
        for name, scores in facts["metrics"].items():
            log.info("%s, %s: base %s, tuned %s", task, name, scores["base"], scores["tuned"])
    return found


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["base", *overrides]:
            run("evaluate_base", partial(main, "base"), overrides)
        case ["tuned", *overrides]:
            run("evaluate", partial(main, "tuned"), overrides)
        case found:
            sys.exit(f"evaluate_model.py: the first argument is base or tuned, not {found[:1]}")
