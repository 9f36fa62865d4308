"""Score the base or the tuned model on the test split.

    python stages/evaluate_model.py base     before any training: once per data, template and quantization
    python stages/evaluate_model.py tuned    with the adapter, and the difference to the base

Reads   data/formatted (test), data/models/quantized, data/models/tokenizer; base: data/models/base;
        tuned: data/models/adapter, reports/evaluation_base.json, reports/predictions_base.parquet
Writes  base: reports/evaluation_base.json, reports/predictions_base.parquet
        tuned: reports/evaluation.json, reports/predictions.parquet, reports/before_after.csv
Params  evaluation (base: the keys that score one model), hardware, model.attn_implementation,
        model.dtype, model.trust_remote_code

A row of predictions: prompt "<|im_start|>user\\nset a timer for 99 minutes<|im_end|>\\n<|im_start|>assistant
\\n", reference '{"name": "set_timer", "arguments": {"minutes": 99}}', completion, loss, exact_match, ...
"""

import json
import math
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from capas import gate, hardware, metrics
from capas.errors import CapasError
from capas.facts import read_json, write_csv, write_json
from capas.params import Params
from capas.records import FORMATTED, evenly_spaced, read_records, write_records
from capas.stage import Stage, log, run

if TYPE_CHECKING:
    from torch import nn

Row = dict[str, Any]
DATA, TOKENIZER = "data/formatted", "data/models/tokenizer"
BASE, QUANTIZED, ADAPTER = "data/models/base", "data/models/quantized", "data/models/adapter"
GROUPS = ("kind", "language", "function", "turns")  # keys of metadata that scores are given by
HEADLINE = ("loss", "perplexity", "token_accuracy", "exact_match", "valid_json", "stop_rate")
PREDICTIONS = pa.schema(
    [(name, pa.string()) for name in ("id", "metadata", "prompt", "reference", "completion")]
    + [
        ("loss", pa.float64()),
        ("num_supervised_tokens", pa.int32()),
        ("token_accuracy", pa.float64()),
    ]
    + [(name, pa.bool_()) for name in ("exact_match", "valid_json", "stopped", "empty")]
)


def main(which: Literal["base", "tuned"], params: Params, stage: Stage) -> None:
    device = hardware.prepare(params.hardware)  # before torch is imported
    from capas.model import attach_adapter, load_model, quantization_method

    records = choose(
        list(read_records(stage.dep(DATA) / "test.parquet", FORMATTED)),
        params.evaluation.max_records,
    )
    model = load_model(stage.dep(QUANTIZED), params.model, device)
    if which == "tuned":
        model = attach_adapter(model, stage.dep(ADAPTER))
    rows = score(model, records, params, stage)
    if params.evaluation.metrics:
        rows = answer(model, rows, records, params, stage)
    facts = summarize(rows)
    shown = {name: facts[name] for name in ("loss", *params.evaluation.metrics)}
    log.info("%s: %s", which, ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))

    if which == "base":
        whole: dict[str, Any] | None = facts
        if quantization_method(model) != "none":
            del model  # one model in memory at a time
            model = load_model(stage.dep(BASE), params.model, device)
            came_quantized = quantization_method(model) != "none"
            whole = None if came_quantized else summarize(score(model, records, params, stage))
        facts["full_precision"] = whole and {name: whole[name] for name in ("loss", "perplexity")}
        write_json(stage.out("reports/evaluation_base.json"), facts)
        # In a name of their own, so that `dvc exp show` calls the tuned model's `loss` and not FILE:loss.
        write_json(stage.out("reports/metrics/base.json"), {"base": headline(facts)})
        write_records(stage.out("reports/predictions_base.parquet"), PREDICTIONS, rows)
    else:
        before = list(read_records(stage.dep("reports/predictions_base.parquet"), PREDICTIONS))
        base = read_json(stage.dep("reports/evaluation_base.json"))
        report = compare(before, rows, facts, params)
        report["gate"] = gate.judge(base, report, params.evaluation.gate)
        log.info("gate %s", gate.verdict(report["gate"]))
        write_json(stage.out("reports/evaluation.json"), report)
        write_json(stage.out("reports/metrics/tuned.json"), headline(facts) | gains(report))
        write_records(stage.out("reports/predictions.parquet"), PREDICTIONS, rows)
        bars = before_after({"base": base, "tuned": facts})
        write_csv(
            stage.out("reports/before_after.csv"), ("kind", "model", "bar", "exact_match"), bars
        )


def choose(records: list[Row], max_records: int | None) -> list[Row]:
    """At most `max_records` of the split."""
    return records if max_records is None else evenly_spaced(records, max_records)


def score(model: "nn.Module", records: list[Row], params: Params, stage: Stage) -> list[Row]:
    """Loss in nats a supervised token, and how many of them the model would have chosen itself.

    Raises:
        CapasError: a loss is no number.
    """
    from capas.batches import Collator, make_example, score_examples

    collator = Collator(read_chat(stage)["pad_token_id"])
    examples = [make_example(record) for record in records]
    found = score_examples(model, examples, collator, params.evaluation.batch_size).tolist()
    for record, (loss, _, _) in zip(records, found, strict=True):
        if not math.isfinite(loss):
            raise CapasError(
                f"the loss of test record {record['id']} is {loss}: the model is broken"
            )
    return [
        {
            **{name: record[name] for name in ("id", "metadata", "reference")},
            "loss": loss / count,
            "num_supervised_tokens": int(count),
            "token_accuracy": hits / count,
        }
        for record, (loss, hits, count) in zip(records, found, strict=True)
    ]


def answer(
    model: "nn.Module", rows: list[Row], records: list[Row], params: Params, stage: Stage
) -> list[Row]:
    """The rows with a greedy completion each and what it is worth.

    Raises:
        CapasError: a prompt is not what training would see before the same answer.
    """
    from tokenizers import Tokenizer

    from capas.generation import complete, generation_config

    tokenizer = Tokenizer.from_file(str(stage.dep(TOKENIZER) / "tokenizer.json"))
    prompts = [record["prompt_ids"] for record in records]
    check_prompts(records)
    config = generation_config(read_chat(stage), params.evaluation.max_new_tokens)
    found = [group[0] for group in complete(model, prompts, config, params.evaluation.batch_size)]
    texts = tokenizer.decode_batch([c.input_ids for c in found], skip_special_tokens=False)
    questions = tokenizer.decode_batch(prompts, skip_special_tokens=False)
    rules = {
        "exact_match": metrics.exact_match,
        "valid_json": lambda text, _: metrics.valid_json(text),
    }
    wanted = {name: rules[name] for name in params.evaluation.metrics}
    return [
        {
            **row,
            "prompt": question,
            "completion": text,
            **{name: rule(text, row["reference"]) for name, rule in wanted.items()},
            "stopped": completion.stopped,
            "empty": not text.strip(),
        }
        for row, question, text, completion in zip(rows, questions, texts, found, strict=True)
    ]


def check_prompts(records: list[Row]) -> None:
    for record in records:
        sure = record["prompt_ids"][
            :-1
        ]  # a tokenizer may melt the last one with the answer's first
        if record["input_ids"][: len(sure)] != sure:
            raise CapasError(
                f"data/formatted/test.parquet, record {record['id']}: prompt_ids is not how input_ids "
                "begins; the model would be asked in another format than it was trained in. "
                "Run `dvc repro -f format`."
            )


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Loss and token accuracy are means over tokens, the rest over records; None was not asked for."""
    tokens = sum(row["num_supervised_tokens"] for row in rows)
    loss, accuracy = (
        sum(row[name] * row["num_supervised_tokens"] for row in rows) / tokens
        for name in ("loss", "token_accuracy")
    )
    shares = {
        "exact_match": "exact_match",
        "valid_json": "valid_json",
        "stopped": "stop_rate",
        "empty": "empty_rate",
    }
    return {
        "num_records": len(rows),
        "loss": loss,
        "perplexity": metrics.perplexity(loss),
        "token_accuracy": accuracy,
        **{name: share(rows, column) for column, name in shares.items()},
        "by": {
            name: by_group(rows, name)
            for name in GROUPS
            if all(name in metadata(row) for row in rows)
        },
    }


def share(rows: list[Row], column: str) -> float | None:
    return (
        sum(row[column] for row in rows) / len(rows) if all(column in row for row in rows) else None
    )


def by_group(rows: list[Row], name: str) -> dict[str, Any]:
    """Scores of the records with each value of metadata's `name`, in the order in which the values come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(metadata(row)[name]), []).append(row)
    scores = ("exact_match", "valid_json")
    return {
        value: {"num_records": len(group), **{column: share(group, column) for column in scores}}
        for value, group in groups.items()
    }


def compare(
    before: list[Row], after: list[Row], tuned: dict[str, Any], params: Params
) -> dict[str, Any]:
    """The tuned model's scores and what it gained, with a paired bootstrap interval.

    Raises:
        CapasError: base and tuned model were not scored on the same records.
    """
    if [row["id"] for row in before] != [row["id"] for row in after]:
        raise CapasError(
            "reports/predictions_base.parquet holds other records; run `dvc repro evaluate_base`"
        )

    def difference(column: str, weights: list[int] | None = None) -> dict[str, float]:
        return metrics.paired_difference(
            [float(row[column]) for row in before],
            [float(row[column]) for row in after],
            weights or [1] * len(after),
            resamples=params.evaluation.bootstrap_resamples,
            confidence_fraction=params.evaluation.confidence_fraction,
            seed=params.evaluation.seed,
        )

    tokens = [row["num_supervised_tokens"] for row in after]
    gains = {name: difference(name) for name in params.evaluation.metrics}
    return {
        "tuned": tuned,
        "difference": gains | {"loss": difference("loss", tokens)},
        "confidence_fraction": params.evaluation.confidence_fraction,
        "bootstrap_resamples": params.evaluation.bootstrap_resamples,
    }


def headline(facts: dict[str, Any]) -> dict[str, Any]:
    """What `dvc metrics show` puts side by side for base and tuned model."""
    return {name: facts[name] for name in HEADLINE}


def gains(report: dict[str, Any]) -> dict[str, float]:
    """The interval of each score's difference, flat."""
    return {
        f"{score}_gain{suffix}": interval[name]
        for score, interval in report["difference"].items()
        if score == "exact_match"
        for name, suffix in (("mean", ""), ("low", "_low"), ("high", "_high"))
    }


def before_after(facts: dict[str, dict[str, Any]]) -> list[Row]:
    """A row for all records and for each kind of them, base before tuned."""
    scores = {
        model: {"all": found, **found["by"].get("kind", {})} for model, found in facts.items()
    }
    return [
        {
            **{"kind": kind, "model": model, "bar": f"{kind}, {model}"},
            "exact_match": scores[model][kind]["exact_match"],
        }
        for kind in scores["tuned"]
        for model in scores
    ]


def metadata(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["metadata"])
    return found


def read_chat(stage: Stage) -> dict[str, Any]:
    return read_json(stage.dep(DATA) / "chat.json")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["base", *overrides]:
            run("evaluate_base", partial(main, "base"), overrides)
        case ["tuned", *overrides]:
            run("evaluate", partial(main, "tuned"), overrides)
        case found:
            sys.exit(f"evaluate_model.py: the first argument is base or tuned, not {found[:1]}")
