"""A run's numbers, read from the stages' outputs and arranged as the report tells them.

Plain dicts and lists, so that the page's texts can name a number: `{{ padding.fraction|pct }}`.
A number that a run does not have (no completions generated, nothing quantized) is None.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from capas import saved
from capas.facts import read_json
from capas.metrics.names import headline
from capas.page.intervals import wilson_interval
from capas.page.neighbours import read_header
from capas.records import before_last_answer

Row = dict[str, Any]
NUM_WRONG = 6  # answers shown


def read_csv(file: Path) -> list[Row]:
    """Rows; a file with nothing but its header has none."""
    rows: list[Row] = pa_csv.read_csv(file).to_pylist()
    return rows


def read_lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


CHANGES = (
    *("refused", "dropped", "truncated", "supervised_tokens_lost", "stop_tokens_lost"),
    *("trailing_messages_cut", "contents_trimmed", "thoughts_dropped", "control_tokens_in_content"),
)


def changes(splits: Mapping[str, Row]) -> dict[str, int]:
    """What format did to records, over all splits; what it did not do is not there."""
    counts = {name: sum(split[name] for split in splits.values()) for name in CHANGES}
    return {name: count for name, count in counts.items() if count}


def scores(base: Row, evaluation: Row) -> dict[str, Any]:
    """Base, copied answers and tuned side by side; `groups` holds every part of the test split.

    `is_share`: the headline lies between 0 and 1, so that it can be a percentage and have an interval.
    """
    tuned, confidence = evaluation["tuned"], evaluation["confidence_fraction"]
    metrics, shares = evaluation["metrics"], evaluation["shares"]
    name, nearest = headline(metrics), base["nearest"]
    models = {"base": base, **({"nearest": nearest} if nearest else {}), "tuned": tuned}

    def compared(parts: Mapping[str, Row]) -> Row:
        found = {m: _score(part, name, name in shares, confidence) for m, part in parts.items()}
        return {**found, "num_records": parts["tuned"]["num_records"]}

    groups = {
        group: [
            {"label": label, **compared({m: of["by"][group][label] for m, of in models.items()})}
            for label in parts
        ]
        for group, parts in tuned["by"].items()
    }
    return {
        "base": base,
        "tuned": tuned,
        "metrics": metrics,
        "shares": shares,
        "headline": name,
        "is_share": name in shares,
        "nearest": nearest,
        "over_nearest": evaluation["difference_to_nearest"].get(name),
        "overall": compared(models),
        "groups": groups,
        "difference": evaluation["difference"],
        "confidence": confidence,
        "power": evaluation["power_fraction"],
        "resamples": evaluation["bootstrap_resamples"],
        "generated": bool(metrics),
        "general": evaluation["general"],
        "harness": evaluation.get("harness"),
        "gate": evaluation["gate"],
    }


def _score(
    part: Row, name: str, is_share: bool, confidence: float
) -> tuple[float, float | None, float | None] | None:
    """(score, low, high). Wilson's interval is that of right or wrong: too wide for scores in between."""
    score, num_records = part.get(name), part["num_records"]
    if score is None or not num_records:
        return None
    if not is_share:
        return score, None, None
    return (score, *wilson_interval(score * num_records, num_records, confidence))


def origin(source: Row) -> dict[str, Any]:
    """What fetch says of the records, as tables: what was dropped (most first), repaired, left out."""
    dropped = [{"reason": reason, **entry} for reason, entry in source["dropped"].items()]
    repaired = [{"reason": reason, **entry} for reason, entry in source["repaired"].items()]
    left_out = sorted(source["left_out"].items(), key=lambda item: (-item[1], item[0]))
    return {
        **source,
        "dropped": sorted(dropped, key=lambda row: -row["count"]),
        "num_dropped": sum(row["count"] for row in dropped),
        "repaired": repaired,
        "left_out": left_out,
        "num_kept": sum(split["num_records"] for split in source["splits"].values()),
    }


def answers(
    base_file: Path, tuned_file: Path, messages: Mapping[str, list[Row]], metric: str
) -> dict[str, Any]:
    """The first test record that the tuned model gets right, and one that it gets wrong of each kind.

    Where scores lie in between (`graded`): the first that it answers better than the base, and the lowest.
    """
    base = {row["id"]: row for row in pq.read_table(base_file).to_pylist()}
    rows = [
        {
            **json.loads(row["metadata"]),
            "messages": messages[row["id"]],
            "reference": row["reference"],
            "base": base[row["id"]]["completion"],
            "tuned": row["completion"],
            "score": row[metric],
            "right": row[metric] == 1,
            "gain": row[metric] - base[row["id"]][metric],
        }
        for row in pq.read_table(tuned_file).to_pylist()
        if row["completion"] is not None and row["id"] in base and row["id"] in messages
    ]
    if any(row["score"] not in (0, 1) for row in rows):
        return _graded(rows)
    example = next((row for row in rows if row["right"]), rows[0] if rows else None)
    wrong = [row for row in rows if not row["right"]]
    first: dict[Any, Row] = {}
    for row in wrong:
        first.setdefault(row.get("kind"), row)
    shown = list(first.values()) if len(first) > 1 else wrong[:NUM_WRONG]
    found = {"example": example, "wrong": shown[:NUM_WRONG], "num_wrong": len(wrong)}
    return {**found, "graded": False}


def _graded(rows: list[Row]) -> dict[str, Any]:
    for row in rows:
        row["right"] = row["gain"] > 0
    example = next((row for row in rows if row["right"]), rows[0])
    lowest = sorted(rows, key=lambda row: float(row["score"]))[:NUM_WRONG]
    return {"example": example, "wrong": lowest, "num_wrong": len(rows), "graded": True}


def conversations(file: Path) -> dict[str, list[Row]]:
    """id -> messages up to the last answer, which is the one that is asked for."""
    rows = pq.read_table(file, columns=["id", "messages"]).to_pylist()
    return {row["id"]: before_last_answer(row["messages"]) for row in rows}


def adapter(folder: Path) -> dict[str, Any]:
    """The adapter's rank, its bytes, how many layers it stands beside and of what kinds.

    `adapter` and `adapted` are None of a whole model, all of whose weights were trained.
    """
    found = {"adapter": None, "adapted": None, "adapter_bytes": saved.weight_bytes(folder)}
    if not saved.is_adapter(folder):
        return found
    tensors, _ = read_header(folder / "adapter_model.safetensors")
    layers = {name.split(".lora_")[0] for name in tensors if ".lora_" in name}
    kinds = sorted({layer.split(".")[-1] for layer in layers})
    return {
        **found,
        "adapter": read_json(folder / "adapter_config.json"),
        "adapted": {"num_layers": len(layers), "kinds": kinds},
    }


def curve(history: Sequence[Row], max_grad_norm: float, vocab_size: int) -> dict[str, Any]:
    """The ends of the training curve, and what a model that knows nothing would score.

    A training shorter than logging_steps has no row, and then no ends.
    """
    norms = [row["grad_norm"] for row in history]
    return {
        "first": history[0] if history else None,
        "last": history[-1] if history else None,
        "num_clipped": sum(norm > max_grad_norm for norm in norms) if max_grad_norm else None,
        "num_logged": len(norms),
        "uniform_loss": math.log(vocab_size),
    }


def samples(lines: Sequence[Row], summary: Row) -> dict[str, Any]:
    """Completions by prompt, then by setting: [{messages, reference, rows: [{setting, base, tuned}]}]."""
    prompts: dict[str, Row] = {}
    for line in lines:
        entry = {"messages": line["messages"], "reference": line["reference"], "rows": {}}
        prompt = prompts.setdefault(line["prompt_id"], entry)
        row = prompt["rows"].setdefault((line["template"], line["setting"]), {})
        counts: Counter[str] = Counter(line["completions"])
        row[line["model"]] = [{"text": text, "times": n} for text, n in counts.items()]
    return {
        "prompts": [
            {
                **prompt,
                "rows": [
                    {"setting": setting, "wrong_template": template == "wrong", **models}
                    for (template, setting), models in prompt["rows"].items()
                ],
            }
            for prompt in prompts.values()
        ],
        "metric": summary["metric"],
        "settings": summary["settings"],
        "wrong_template": summary["wrong_template"],
        "next_token": summary["next_token"],
    }


def favourites(probabilities: Sequence[Row], model: str = "tuned") -> dict[str, Row]:
    """Per setting: how probable the favourite is, and how many of the shown tokens may come at all."""
    found: dict[str, Row] = {}
    for row in probabilities:
        if row["model"] == model:
            entry = found.setdefault(row["setting"], {"probability": row["probability"], "kept": 0})
            entry["kept"] += row["probability"] > 0
            entry["shown"] = entry.get("shown", 0) + 1
    return found


NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # change nothing


def effective(setting: Row) -> Row:
    """What of a decoding setting has an effect; null stands for not given."""
    if not setting.get("do_sample"):
        return {"do_sample": False}
    changed = {
        k: v for k, v in setting.items() if k != "do_sample" and v not in (None, NEUTRAL.get(k))
    }
    return changed or {"do_sample": True}


def decoding(settings: Mapping[str, Row]) -> dict[str, Any]:
    """Which setting shows what: the first that does just that, or None."""
    draws = {name: effective(s) for name, s in settings.items() if s.get("do_sample")}
    warmed = [name for name, s in draws.items() if "temperature" in s]
    cut_k = [name for name, s in draws.items() if "top_k" in s]
    cut_p = [name for name, s in draws.items() if "top_p" in s]
    plain = [name for name in draws if name not in {*warmed, *cut_k, *cut_p}]
    return {
        "effective": {name: effective(setting) for name, setting in settings.items()},
        "greedy": next((name for name in settings if name not in draws), None),
        "drawn": next(iter([*plain, *draws]), None),
        "multinomial": next(iter(plain), None),
        "temperatures": warmed,
        "top_k": next(iter(cut_k), None),
        "top_p": next(iter(cut_p), None),
    }
