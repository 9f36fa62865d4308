"""Read a run's numbers from the stages' outputs, and arrange them for the report.

They are plain dicts and lists, so that the page's texts can name a number: `{{ padding.fraction|pct }}`.
A number that a run does not have (no completions generated, nothing quantized) is None.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from capas.core.files import read_json
from capas.core.params import flatten
from capas.core.records import before_last_answer
from capas.evaluation.names import generates, headline
from capas.evaluation.nearest import distance_group
from capas.models import tuned_weights
from capas.models.stored_tensors import read_header
from capas.models.weights import weight_bytes
from capas.report import labels
from capas.report.intervals import mean_interval

Row = dict[str, Any]
NUM_WRONG = 6  # answers shown
_ROUNDING = 0.01  # epochs
MAX_PARTS = 12  # parts of the test split in one plot
SIMILARITIES = (0.0, 0.2, 0.4, 0.6, 0.8)  # lower edges of the bins in the plot over distance


def read_csv(file: Path) -> list[Row]:
    """Return the rows of a CSV file; a file with only a header has none."""
    rows: list[Row] = pa_csv.read_csv(file).to_pylist()
    return rows


def read_lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


CHANGES = (
    *("refused", "dropped", "truncated", "supervised_tokens_lost", "stop_tokens_lost"),
    *("trailing_messages_cut", "contents_trimmed", "thoughts_dropped", "control_tokens_in_content"),
)


def changes(splits: Mapping[str, Row]) -> dict[str, int]:
    """Return how often format changed records in each way, over all splits, without zero counts."""
    counts = {name: sum(split[name] for split in splits.values()) for name in CHANGES}
    return {name: count for name, count in counts.items() if count}


def learned_from(train: Row, trainer: Mapping[str, Any], num_records: int) -> Row:
    """Return how many training records the steps covered, and whether the training ended early.

    Args:
        train: reports/train.json.
        trainer: the parameters of the group.
        num_records: records in the training split.
    """
    seen = train["num_steps"] * train["global_batch_size"]
    if train["packing"]:  # a row of a batch holds several records
        seen = round(num_records * train["num_epochs"])
    planned, done = trainer["max_steps"], train["num_steps"]
    if planned < 1:
        planned, done = trainer["num_train_epochs"], train["num_epochs"]
    return {
        "num_records": min(seen, num_records),
        "is_all": seen >= num_records,
        "ended_early": done < planned - _ROUNDING,
    }


def overridden(overrides: Row, flat_params: Row) -> list[str]:
    """Return the dotted keys of the parameters that conf/overrides.yaml sets; a choice is its `preset`."""
    chosen = [
        key for entry in overrides.get("defaults") or [] if isinstance(entry, dict) for key in entry
    ]
    presets = [f"{key.removeprefix('override /')}.preset" for key in chosen]
    set_there = flatten({key: value for key, value in overrides.items() if key != "defaults"})
    return [key for key in (*presets, *set_there) if key in flat_params]


def test_records(files: Mapping[str, Path]) -> list[Row]:
    """Return a row for each test record: its parts of the split, its similarity and every model's row.

    Args:
        files: {base, nearest and tuned: their predictions}; `nearest` is empty if nothing was generated.
    """
    found = {m: {row["id"]: row for row in pq.read_table(f).to_pylist()} for m, f in files.items()}
    rows = []
    for name, tuned in found["tuned"].items():
        parts = {key: str(value) for key, value in json.loads(tuned["metadata"]).items()}
        similarity = found["nearest"].get(name, {}).get("similarity")
        if similarity is not None:
            parts["distance"] = distance_group(similarity)
        models = {model: of[name] for model, of in found.items() if name in of}
        rows.append({"id": name, "parts": parts, "similarity": similarity, "models": models})
    return rows


def scores(base: Row, evaluation: Row, records: Sequence[Row]) -> dict[str, Any]:
    """Return base, copied answers and tuned side by side; `groups` holds every part of the test split.

    `is_share`: the headline lies between 0 and 1, so that it can be a percentage and have an interval.

    Args:
        records: the result of `test_records`.
    """
    tuned, metrics, shares = evaluation["tuned"], evaluation["metrics"], evaluation["shares"]
    name, nearest = headline(metrics), base["nearest"]
    models = {"base": base, **({"nearest": nearest} if nearest else {}), "tuned": tuned}
    interval = _Interval(
        name, name in shares, evaluation["confidence_fraction"], evaluation["bootstrap_resamples"]
    )
    groups = {group: interval.by_part(group, models, records) for group in tuned["by"]}
    plotted = (group for group in ("kind", "function", *groups) if group in groups)
    drawn = next((g for g in plotted if g != "distance" and 1 < len(groups[g]) <= MAX_PARTS), None)
    return {
        "base": base,
        "tuned": tuned,
        "metrics": metrics,
        "shares": shares,
        "headline": name,
        "is_share": name in shares,
        "nearest": nearest,
        "over_nearest": evaluation["difference_to_nearest"].get(name),
        "overall": interval.compared(models, records),
        "groups": groups,
        "drawn_group": drawn,
        "by_similarity": interval.by_similarity(records, list(models)),
        "difference": evaluation["difference"],
        "confidence": evaluation["confidence_fraction"],
        "power": evaluation["power_fraction"],
        "resamples": evaluation["bootstrap_resamples"],
        "scored": bool(metrics),
        "generated": generates(metrics),
        "labels": labels.arrange(base, evaluation),
        "general": evaluation["general"],
        "harness": evaluation.get("harness"),
        "noise": evaluation.get("noise"),
        "gate": {
            **evaluation["gate"],
            "checks": [{**c, "digits": _digits(c)} for c in evaluation["gate"]["checks"]],
        },
    }


def _digits(check: Row) -> int:
    """Return how many decimals of a percentage tell a value from its limit: 89.96 % is not 90.0 %."""
    value, limit = check["value"], check["limit"]
    if value is None or limit is None or value == limit:
        return 1
    shown = (d for d in range(1, 7) if f"{100 * value:.{d}f}" != f"{100 * limit:.{d}f}")
    return next(shown, 7)


@dataclass(frozen=True)
class _Interval:
    """The intervals of the metric `name`."""

    name: str
    is_share: bool
    confidence: float
    resamples: int

    def around(
        self, part: Row, rows: Sequence[Row]
    ) -> tuple[float, float | None, float | None] | None:
        """Return (score, low, high) of a part of the split, or None if it has no score."""
        score = part.get(self.name)
        if score is None or not part["num_records"]:
            return None
        values = [float(row[self.name]) for row in rows]
        if not (self.is_share and values):
            return score, None, None
        low, high = mean_interval(values, self.confidence, self.resamples)
        return score, min(low, score), max(high, score)  # the score in the file is rounded

    def compared(self, parts: Mapping[str, Row], records: Sequence[Row]) -> Row:
        """Return `around` for each model, and the number of records.

        Args:
            parts: {model: its summary of these records}.
        """
        found = {
            model: self.around(part, [r["models"][model] for r in records if model in r["models"]])
            for model, part in parts.items()
        }
        return {**found, "num_records": parts["tuned"]["num_records"]}

    def by_part(self, group: str, models: Mapping[str, Row], records: Sequence[Row]) -> list[Row]:
        """Return `compared` for each part of the test split that has a value of `group`."""
        found = []
        for label in models["tuned"]["by"][group]:
            parts = {model: of["by"][group][label] for model, of in models.items()}
            within = [r for r in records if r["parts"].get(group) == label]
            found.append({"label": label, **self.compared(parts, within)})
        return found

    def by_similarity(self, records: Sequence[Row], models: Sequence[str]) -> list[Row]:
        """Return a row for each bin of similarity to the training split that holds a record."""
        measured = [r for r in records if r["similarity"] is not None]
        found = []
        for low, high in zip(SIMILARITIES, (*SIMILARITIES[1:], None), strict=True):
            within = [
                r
                for r in measured
                if low <= r["similarity"] and (high is None or r["similarity"] < high)
            ]
            if not within:
                continue
            row: Row = {
                "low": low,
                "high": 1.0 if high is None else high,
                "num_records": len(within),
            }
            for model in models:
                rows = [r["models"][model] for r in within]
                mean = sum(float(r[self.name]) for r in rows) / len(rows)
                row[model] = self.around({self.name: mean, "num_records": len(rows)}, rows)
            found.append(row)
        return found


def origin(source: Row) -> dict[str, Any]:
    """Return fetch's report on the records as tables: dropped (most first), repaired and left out."""
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
    records: Sequence[Row], messages: Mapping[str, list[Row]], metric: str, languages: Iterable[str]
) -> dict[str, Any]:
    """Return test records with both answers: an example in each language, and some that are wrong.

    The example is the first record that the tuned model gets right; the wrong answers are one of each kind.
    If scores can lie between 0 and 1 (`graded`), the example is the first record that the tuned model answers
    better than the base, and the records with the lowest scores take the place of wrong ones.
    """
    rows = []
    for record in records:
        base, tuned = (record["models"].get(model) for model in ("base", "tuned"))
        if base is None or tuned["completion"] is None or record["id"] not in messages:
            continue
        rows.append(
            {
                "kind": record["parts"].get("kind"),
                "language": record["parts"].get("language"),
                "messages": messages[record["id"]],
                "reference": tuned["reference"],
                "base": base["completion"],
                "tuned": tuned["completion"],
                "score": tuned[metric],
                "right": tuned[metric] == 1,
                "gain": tuned[metric] - base[metric],
            }
        )
    graded = any(row["score"] not in (0, 1) for row in rows)
    if graded:
        for row in rows:
            row["right"] = row["gain"] > 0
    examples = {code: _example(rows, code) for code in languages}
    if graded:
        lowest = sorted(rows, key=lambda row: float(row["score"]))[:NUM_WRONG]
        return {"examples": examples, "wrong": lowest, "num_wrong": len(rows), "graded": True}
    wrong = [row for row in rows if not row["right"]]
    first: dict[Any, Row] = {}
    for row in wrong:
        first.setdefault(row.get("kind"), row)
    shown = list(first.values()) if len(first) > 1 else wrong[:NUM_WRONG]
    found = {"examples": examples, "wrong": shown[:NUM_WRONG], "num_wrong": len(wrong)}
    return {**found, "graded": False}


def _example(rows: Sequence[Row], language: str) -> Row | None:
    """Return the first right record, in this language if there is one; otherwise the first record."""
    right = [row for row in rows if row["right"]] or list(rows)
    spoken = (row for row in right if row["language"] == language)
    return next(spoken, right[0] if right else None)


def conversations(file: Path) -> dict[str, list[Row]]:
    """Return {id: messages before the last answer}, which are the prompt of that answer."""
    rows = pq.read_table(file, columns=["id", "messages"]).to_pylist()
    return {row["id"]: before_last_answer(row["messages"]) for row in rows}


def adapter(folder: Path) -> dict[str, Any]:
    """Return the adapter's configuration and bytes, and the number and kinds of the layers that it adapts.

    For a whole model, whose weights were all trained, `adapter` and `adapted` are None.
    """
    found = {"adapter": None, "adapted": None, "adapter_bytes": weight_bytes(folder)}
    if not tuned_weights.is_adapter(folder):
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
    """Return both ends of the training curve, and the loss of a model that knows nothing.

    A training shorter than logging_steps has no rows; both ends are then None.
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
    """Return completions by prompt and setting: [{messages, reference, rows: [{setting, base, tuned}]}]."""
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
    """Return, by setting, the probability of the favourite and how many of the shown tokens are possible."""
    found: dict[str, Row] = {}
    for row in probabilities:
        if row["model"] == model:
            entry = found.setdefault(row["setting"], {"probability": row["probability"], "kept": 0})
            entry["kept"] += row["probability"] > 0
            entry["shown"] = entry.get("shown", 0) + 1
    return found


NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # change nothing


def effective(setting: Row) -> Row:
    """Return the values of a decoding setting that have an effect; null means not given."""
    if not setting.get("do_sample"):
        return {"do_sample": False}
    changed = {
        k: v for k, v in setting.items() if k != "do_sample" and v not in (None, NEUTRAL.get(k))
    }
    return changed or {"do_sample": True}


def decoding(settings: Mapping[str, Row]) -> dict[str, Any]:
    """Return which setting demonstrates what: the first that changes just that, or None."""
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
