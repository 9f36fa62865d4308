"""Score the base or the tuned model on the test split.

    python stages/evaluate_model.py base     before any training: once per data, template and quantization
    python stages/evaluate_model.py tuned    with the adapter, and the difference to the base

Reads   data/formatted (test), data/models/quantized, data/models/tokenizer, data/composed/metrics.json;
        base: data/models/base, data/raw and data/formatted (train) for the answers that could be copied;
        tuned: data/models/adapter, data/general, data/composed/harness.json and what base wrote
Writes  base: reports/evaluation_base.json, reports/predictions_{base,nearest}.parquet
        tuned: reports/evaluation.json, reports/predictions.parquet, reports/before_after.csv
Params  evaluation (base: the keys that score one model), hardware, model.attn_implementation,
        model.dtype, model.trust_remote_code

A row of predictions: prompt "<|im_start|>user\\nset a timer for 99 minutes<|im_end|>\\n<|im_start|>assistant
\\n", reference '{"name": "set_timer", "arguments": {"minutes": 99}}', completion, loss, exact_match, ...
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from capas.chat.recorded import recorded_format
from capas.core.errors import CapasError
from capas.core.files import read_json, write_csv, write_json
from capas.core.params import Params
from capas.core.records import FORMATTED, evenly_spaced, read_records, write_records
from capas.core.stage import Stage, log, run
from capas.evaluation import comparison, gate, harness
from capas.evaluation.copied import copied_values
from capas.evaluation.general import format_questions
from capas.evaluation.names import BINARY, headline
from capas.evaluation.nearest import distance_group, nearest_prompts
from capas.evaluation.power import POWER_FRACTION
from capas.evaluation.prompts import answer_limit, read_questions
from capas.evaluation.scorer import Scorer
from capas.models import hardware
from capas.models.vocabulary import check_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

    from capas.models.loading import TunedModel

Row = dict[str, Any]
DATA, TOKENIZER, METRICS = "data/formatted", "data/models/tokenizer", "data/composed/metrics.json"
RAW_DATA, NEAREST = "data/raw", "reports/predictions_nearest.parquet"
HARNESS = "data/composed/harness.json"
GENERAL = "data/general/records.jsonl"
BASE, QUANTIZED, ADAPTER = "data/models/base", "data/models/quantized", "data/models/adapter"
GROUPS = ("kind", "language", "function", "turns")  # keys of metadata that scores are given by
DISTANCES = ("twin", "near", "far")  # of a test prompt to the most similar training prompt
RATES = {  # columns of predictions -> keys of the reports
    "stopped": "stop_rate",
    "empty": "empty_rate",
    "control_token": "control_token_rate",
}


def main(which: Literal["base", "tuned"], params: Params, stage: Stage) -> None:
    device = hardware.prepare(params.hardware)  # before torch is imported
    stage.costs |= hardware.machine()
    from capas.models.loading import TunedModel, load_model, quantization_method

    records = choose(
        list(read_records(stage.dep(DATA) / "test.parquet", FORMATTED)),
        params.evaluation.max_records,
    )
    scorer = Scorer(params.evaluation.metrics, stage.dep(METRICS))
    names = scorer.names
    told = (record[name] for record in records for name in ("input_ids", "prompt_ids"))
    others = (read_chat(stage)["pad_token_id"],)
    check_ids(told, others, stage.dep(QUANTIZED), stage.dep(TOKENIZER))
    records = ask(records, scorer, stage) if names else records
    load_base = partial(load_model, stage.dep(QUANTIZED), params.model, device)
    if which == "base":
        model = load_base()
    else:
        tuned = TunedModel(stage.dep(ADAPTER), params.model, device, load_base)
        model = tuned.model
    rows = score(model, records, params, stage)
    limit = answer_limit(records, params.evaluation.max_new_tokens) if names else None
    if limit is not None:
        rows = answer(model, rows, records, scorer, limit, params, stage)
    copies = read_copies(stage) if which == "tuned" else copy_nearest(records, scorer, stage)
    distances = {row["id"]: distance_group(row["similarity"]) for row in copies}
    facts = {**summarize(rows, names, distances), "max_new_tokens": limit}
    shown = {name: facts[name] for name in ("loss", *names)}
    log.info("%s: %s", which, ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))

    if which == "base":
        facts["nearest"] = summarize_copies(copies, names, distances)
        whole: dict[str, Any] | None = facts
        if quantization_method(model) != "none":
            del model  # one model in memory at a time
            model = load_model(stage.dep(BASE), params.model, device)
            came_quantized = quantization_method(model) != "none"
            whole = None if came_quantized else summarize(score(model, records, params, stage), [])
        facts["full_precision"] = whole and {name: whole[name] for name in ("loss", "perplexity")}
        write_json(stage.out("reports/evaluation_base.json"), facts)
        # In a name of their own, so that `dvc exp show` calls the tuned model's `loss` and not FILE:loss.
        write_json(stage.out("reports/metrics/base.json"), {"base": side_by_side(facts, names)})
        schema = predictions_schema(names)
        write_records(stage.out("reports/predictions_base.parquet"), schema, rows)
        write_records(stage.out(NEAREST), copies_schema(names), copies)
    else:
        report_difference(tuned, rows, copies, facts, names, params, stage)


def predictions_schema(names: list[str]) -> pa.Schema:
    """A row for each record; without metrics nothing is generated, and prompt and completion are null."""
    fields = [
        *((name, pa.string()) for name in ("id", "metadata", "prompt", "reference", "completion")),
        ("loss", pa.float64()),
        ("num_supervised_tokens", pa.int32()),
        ("token_accuracy", pa.float64()),
        *_score_fields(names),
        *((name, pa.bool_()) for name in RATES),
    ]
    return pa.schema(fields)


def copies_schema(names: list[str]) -> pa.Schema:
    """A row for each record: the answer of the most similar training record in the completion's place."""
    texts = ("id", "metadata", "prompt", "reference", "completion", "nearest_id")
    fields = [*((name, pa.string()) for name in texts), ("similarity", pa.float64())]
    return pa.schema([*fields, *_score_fields(names)])


def _score_fields(names: list[str]) -> list[tuple[str, pa.DataType]]:
    scores = [(name, pa.bool_() if name in BINARY else pa.float64()) for name in names]
    return [*scores, ("copied_values", pa.bool_())]


def choose(records: list[Row], max_records: int | None) -> list[Row]:
    """At most `max_records` of the split."""
    return records if max_records is None else evenly_spaced(records, max_records)


def score(model: "nn.Module", records: list[Row], params: Params, stage: Stage) -> list[Row]:
    """Loss in nats a supervised token, and how many of them the model would have chosen itself.

    Raises:
        CapasError: a loss is no number.
    """
    from capas.training.batches import Collator, make_example, score_examples

    collator = Collator(read_chat(stage)["pad_token_id"])
    examples = [make_example(record) for record in records]
    found = score_examples(model, examples, collator, params.evaluation.batch_size).tolist()
    for record, (loss, _, _) in zip(records, found, strict=True):
        if not math.isfinite(loss):
            raise CapasError(f"the loss of record {record['id']} is {loss}: the model is broken")
    return [
        {
            **{name: record[name] for name in ("id", "metadata", "reference")},
            "loss": loss / count,
            "num_supervised_tokens": int(count),
            "token_accuracy": hits / count,
        }
        for record, (loss, hits, count) in zip(records, found, strict=True)
    ]


def ask(records: list[Row], scorer: Scorer, stage: Stage) -> list[Row]:
    """The records with their prompt as text. What would stop the scoring stops it before the generation.

    Raises:
        CapasError: a prompt is not what training would see before the same answer, or a metric cannot score
            the records.
    """
    check_prompts(records)
    prompts = [record["prompt_ids"] for record in records]
    questions = load_tokenizer(stage).decode_batch(prompts, skip_special_tokens=False)
    asked = [{**r, "prompt": question} for r, question in zip(records, questions, strict=True)]
    scorer.check(asked)
    return asked


def answer(
    model: "nn.Module",
    rows: list[Row],
    records: list[Row],
    scorer: Scorer,
    limit: int,
    params: Params,
    stage: Stage,
) -> list[Row]:
    """The rows with a greedy completion each, of up to `limit` tokens, and what it is worth."""
    from capas.evaluation.generation import complete, generation_config

    prompts, chat = [record["prompt_ids"] for record in records], read_chat(stage)
    config = generation_config(chat, limit)
    found = [group[0] for group in complete(model, prompts, config, params.evaluation.batch_size)]
    ids = [completion.input_ids for completion in found]
    tokenizer = load_tokenizer(stage)
    texts, controls = (
        tokenizer.decode_batch(ids, skip_special_tokens=False),
        control_ids(chat, tokenizer),
    )
    asked = [{**row, "prompt": r["prompt"]} for row, r in zip(rows, records, strict=True)]
    return [
        {
            **row,
            "completion": text,
            **scorer.score(text, row),
            "copied_values": copied_values(text, row["reference"], row["prompt"]),
            "stopped": completion.stopped,
            "empty": not text.strip(),
            "control_token": not controls.isdisjoint(completion.input_ids),
        }
        for row, text, completion in zip(asked, texts, found, strict=True)
    ]


def control_ids(chat: Mapping[str, Any], tokenizer: "Tokenizer") -> set[int]:
    """The control tokens that no answer should hold: all but `chat_template.allowed_tokens`."""
    added = tokenizer.get_added_tokens_decoder().items()
    return {i for i, t in added if t.special and t.content not in chat["allowed_tokens"]}


def copy_nearest(records: list[Row], scorer: Scorer, stage: Stage) -> list[Row]:
    """Answer each record with the answer of the training record whose prompt is most similar.

    Nothing where nothing is generated.
    """
    if not scorer.names:
        return []
    train = list(read_answers(stage.dep(DATA) / "train.parquet"))
    known = read_questions(stage.dep(RAW_DATA) / "train.parquet", {row["id"] for row in train})
    asked = read_questions(stage.dep(RAW_DATA) / "test.parquet", {row["id"] for row in records})
    found = nearest_prompts([asked[r["id"]] for r in records], [known[r["id"]] for r in train])
    rows = []
    for record, neighbour in zip(records, found, strict=True):
        copied = train[neighbour.index]
        row = {name: record[name] for name in ("id", "metadata", "prompt", "reference")}
        text = copied["reference"]
        rows.append(
            {
                **row,
                "completion": text,
                "nearest_id": copied["id"],
                "similarity": neighbour.similarity,
                **scorer.score(text, row),
                "copied_values": copied_values(text, row["reference"], row["prompt"]),
            }
        )
    return rows


def read_answers(file: Path) -> Iterator[Row]:
    """The id and the reference of each record of a formatted split."""
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=["id", "reference"]):
            yield from batch.to_pylist()


def read_copies(stage: Stage) -> list[Row]:
    found: list[Row] = pq.read_table(stage.dep(NEAREST)).to_pylist()
    return found


def summarize_copies(
    rows: list[Row], names: list[str], distances: Mapping[str, str]
) -> dict[str, Any] | None:
    """Scores of copied answers, and how similar the prompts are; None where nothing was copied."""
    if not rows:
        return None
    return {
        "num_records": len(rows),
        **{name: mean(rows, name) for name in names},
        **copied(rows),
        "similarity": mean(rows, "similarity"),
        "by": groups(rows, names, distances),
    }


def check_prompts(records: list[Row]) -> None:
    for record in records:
        sure = record["prompt_ids"][
            :-1
        ]  # a tokenizer may melt the last one with the answer's first
        if record["input_ids"][: len(sure)] != sure:
            raise CapasError(
                f"data/formatted/test.parquet, record {record['id']}: prompt_ids is not a prefix of "
                "input_ids, so the model would be prompted in another format than it was trained "
                "in. Run `dvc repro -f format`."
            )


def summarize(
    rows: list[Row], names: list[str], distances: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Loss and token accuracy are means over tokens, the rest over records; None was not generated.

    Args:
        distances: {id: twin, near or far}.
    """
    tokens = sum(row["num_supervised_tokens"] for row in rows)
    loss, accuracy = (
        sum(row[name] * row["num_supervised_tokens"] for row in rows) / tokens
        for name in ("loss", "token_accuracy")
    )
    return {
        "num_records": len(rows),
        "loss": loss,
        "perplexity": comparison.perplexity(loss),
        "token_accuracy": accuracy,
        **{name: mean(rows, name) for name in names},
        **{name: mean(rows, column) for column, name in RATES.items()},
        **copied(rows),
        "by": groups(rows, names, distances or {}),
    }


def copied(rows: list[Row]) -> dict[str, Any]:
    """How many answers have every value of the prompt that their reference repeats, of those that should."""
    having = [row for row in rows if row.get("copied_values") is not None]
    rate = mean(having, "copied_values") if having else None
    return {"copied_value_rate": rate, "num_copied": len(having)}


def mean(rows: list[Row], column: str) -> float | None:
    return (
        sum(row[column] for row in rows) / len(rows) if all(column in row for row in rows) else None
    )


def groups(rows: list[Row], names: list[str], distances: Mapping[str, str]) -> dict[str, Any]:
    """Scores by each key of metadata that all records have, and by distance to the training split."""
    found: dict[str, dict[str, list[Row]]] = {}
    for group in GROUPS:
        if all(group in metadata(row) for row in rows):
            found[group] = {}
            for row in rows:  # in the order in which the values come
                found[group].setdefault(str(metadata(row)[group]), []).append(row)
    if distances:
        far = {d: [row for row in rows if distances[row["id"]] == d] for d in DISTANCES}
        found["distance"] = {distance: part for distance, part in far.items() if part}
    return {
        group: {
            value: {"num_records": len(part), **{name: mean(part, name) for name in names}}
            for value, part in parts.items()
        }
        for group, parts in found.items()
    }


def report_difference(
    tuned: "TunedModel",
    rows: list[Row],
    copies: list[Row],
    facts: dict[str, Any],
    names: list[str],
    params: Params,
    stage: Stage,
) -> None:
    """Write what the tuned model gained over the base, what it forgot, and whether it passes the gate."""
    before = read_base(names, stage)
    base = read_json(stage.dep("reports/evaluation_base.json"))
    report = compare(before, rows, facts, names, params)
    report["difference_to_nearest"] = {
        name: difference(copies, rows, name, params) for name in names if copies
    }
    report["general"] = ask_generally(tuned, params, stage)
    if params.evaluation.harness.tasks:
        report["harness"] = ask_harness(tuned, params, stage)
    report["gate"] = gate.judge(base, report, params.evaluation.gate)
    changes = {**report["difference"], "loss on general questions": report["general"]["difference"]}
    for name, change in report["difference_to_nearest"].items():
        changes[f"{name} over copying the nearest training answer"] = change
    for name, change in changes.items():
        log.info("%s", in_words(name, change))
    log.info("gate %s", gate.verdict(report["gate"]))
    write_json(stage.out("reports/evaluation.json"), report)
    flat = side_by_side(facts, names) | gains(report)
    write_json(stage.out("reports/metrics/tuned.json"), flat)
    write_records(stage.out("reports/predictions.parquet"), predictions_schema(names), rows)
    models = {"base": base, "nearest": base["nearest"], "tuned": facts}
    bars = before_after({k: v for k, v in models.items() if v}, headline(names))
    columns = ("kind", "model", "bar", "metric", "score")
    write_csv(stage.out("reports/before_after.csv"), columns, bars)


def read_base(names: list[str], stage: Stage) -> list[Row]:
    """What the base scored.

    Raises:
        CapasError: in other metrics.
    """
    file, schema = stage.dep("reports/predictions_base.parquet"), predictions_schema(names)
    found = pq.read_schema(file).names
    if found != schema.names:
        other = ", ".join(sorted({*found} ^ {*schema.names})) or "their order"
        raise CapasError(
            "reports/predictions_base.parquet has scores of other metrics than evaluation.metrics "
            f"({other}). Run `dvc repro evaluate_base`, or try other metrics on the base: python "
            "stages/evaluate_model.py base ..."
        )
    return list(read_records(file, schema))


def compare(
    before: list[Row], after: list[Row], tuned: dict[str, Any], names: list[str], params: Params
) -> dict[str, Any]:
    """The tuned model's scores, and what it gained: interval, verdict, records that would show as much.

    `shares` are the metrics whose scores all lie between 0 and 1; those of an own function may not.

    Raises:
        CapasError: base and tuned model were not scored on the same records.
    """
    if [row["id"] for row in before] != [row["id"] for row in after]:
        raise CapasError(
            "reports/predictions_base.parquet has other records. Run `dvc repro evaluate_base`"
        )

    columns = [*names, "loss"]
    return {
        "tuned": tuned,
        "difference": {name: difference(before, after, name, params) for name in columns},
        "metrics": names,
        "shares": [n for n in names if all(0 <= row[n] <= 1 for row in (*before, *after))],
        "confidence_fraction": params.evaluation.confidence_fraction,
        "power_fraction": POWER_FRACTION,
        "bootstrap_resamples": params.evaluation.bootstrap_resamples,
    }


def difference(before: list[Row], after: list[Row], column: str, params: Params) -> dict[str, Any]:
    """Of a column's means: over tokens for the loss, of which less is better, over records for the rest."""
    is_loss = column == "loss"
    weights = [row["num_supervised_tokens"] if is_loss else 1 for row in after]
    scores = [[float(row[column]) for row in rows] for rows in (before, after)]
    confidence = params.evaluation.confidence_fraction
    interval = comparison.paired_difference(
        scores[0],
        scores[1],
        weights,
        resamples=params.evaluation.bootstrap_resamples,
        confidence_fraction=confidence,
        seed=params.evaluation.seed,
    )
    needed = comparison.records_needed(
        scores[0], scores[1], weights, confidence_fraction=confidence
    )
    verdict = comparison.verdict(interval, higher_is_better=not is_loss)
    return {**interval, "verdict": verdict, "num_records_needed": needed}


def ask_generally(tuned: "TunedModel", params: Params, stage: Stage) -> dict[str, Any]:
    """The loss of base and tuned model on general questions: what the model forgot."""
    chat = recorded_format(stage.dep(DATA), stage.dep(TOKENIZER))
    records = format_questions(stage.dep(GENERAL), chat)
    with tuned.base() as base:
        before = score(base, records, params, stage)
    after = score(tuned.model, records, params, stage)
    losses = {
        which: {name: facts[name] for name in ("loss", "perplexity")}
        for which, rows in (("base", before), ("tuned", after))
        for facts in [summarize(rows, [])]
    }
    change = difference(before, after, "loss", params)
    return {"num_records": len(records), **losses, "difference": change}


def ask_harness(tuned: "TunedModel", params: Params, stage: Stage) -> dict[str, Any]:
    """Tasks of the lm-evaluation-harness, of base and tuned model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stage.dep(TOKENIZER))
    tokenizer.chat_template = (stage.dep(DATA) / "chat_template.jinja").read_text(encoding="utf-8")
    settings, composed = params.evaluation, stage.dep(HARNESS)
    found = harness.evaluate(
        tuned, tokenizer, settings.harness, composed, settings.batch_size, settings.seed
    )
    for task, facts in found["tasks"].items():
        for name, scores in facts["metrics"].items():
            log.info("%s, %s: base %s, tuned %s", task, name, scores["base"], scores["tuned"])
    return found


def in_words(name: str, found: dict[str, Any]) -> str:
    """'exact_match +0.25 (0.1 to 0.4): better; 12 records would show it'."""
    needed = found["num_records_needed"]
    seen = f"{name} {found['mean']:+.4g} ({found['low']:+.4g} to {found['high']:+.4g})"
    shown = "" if needed is None else f"; {needed} records would show a difference of that size"
    return f"{seen}: {found['verdict']}{shown}"


def side_by_side(facts: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What `dvc metrics show` puts side by side for base and tuned model.

    `exact_match` stands there even where it was not asked for: it is what a sweep shows beside its objective.
    """
    asked = names if "exact_match" in names else ["exact_match", *names]
    wanted = ("loss", "perplexity", "token_accuracy", *asked, "stop_rate")
    return {name: facts.get(name) for name in wanted}


def gains(report: dict[str, Any]) -> dict[str, float]:
    """The interval of the first metric's difference, flat."""
    return {
        f"{name}_gain{suffix}": report["difference"][name][end]
        for name in report["metrics"][:1]
        for end, suffix in (("mean", ""), ("low", "_low"), ("high", "_high"))
    }


def before_after(facts: dict[str, dict[str, Any]], metric: str) -> list[Row]:
    """A row for all records and for each kind of them that has such a score, base first, tuned last."""
    scores = {
        model: {"all": found, **found["by"].get("kind", {})} for model, found in facts.items()
    }
    return [
        {
            **{"kind": kind, "model": model, "bar": f"{kind}, {model}"},
            **{"metric": metric, "score": scores[model][kind][metric]},
        }
        for kind in scores["tuned"]
        for model in scores
        if metric in scores[model][kind]
    ]


def metadata(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["metadata"])
    return found


def read_chat(stage: Stage) -> dict[str, Any]:
    return read_json(stage.dep(DATA) / "chat.json")


def load_tokenizer(stage: Stage) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(stage.dep(TOKENIZER) / "tokenizer.json"))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["base", *overrides]:
            run("evaluate_base", partial(main, "base"), overrides)
        case ["tuned", *overrides]:
            run("evaluate", partial(main, "tuned"), overrides)
        case found:
            sys.exit(f"evaluate_model.py: the first argument is base or tuned, not {found[:1]}")
