"""A recorded result as a tracker takes it: params, tags, metrics, curve and tables."""

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from capas import gate, timings
from capas.dag import recorded, recorded_key
from capas.facts import read_json
from capas.params import flatten
from capas.stage import Stage
from capas.steps import Step
from capas.store import GATE, Point
from capas.tracking import CURVES

MAX_TEXT = 500  # characters of a param or tag; the artifact params.yaml has them all
_FACTORS = (  # of `Step`
    "hardware.num_processes",
    "trainer.per_device_train_batch_size",
    "trainer.gradient_accumulation_steps",
)
_NOT_IN_A_NAME = re.compile(r"[^\w\-. /]")


def values(lock: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Params that led to the adapter, which its run keeps for ever, and those of what came after."""
    led_to_it = ancestors("train", lock)
    of_training: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for stage, entry in lock.items():
        for file, declared in entry.get("params", {}).items():
            prefix = "environment." if file == "environment.yaml" else ""
            flat = {prefix + key: value for key, value in flatten(declared).items()}
            (of_training if stage in led_to_it else others).update(flat)
    if {*_FACTORS} <= of_training.keys():
        of_training["global_batch_size"] = Step(*(of_training[key] for key in _FACTORS)).num_rows
    return of_training, _shallow({k: v for k, v in others.items() if k not in of_training})


def _shallow(flat: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
    """Keys of at most `depth` parts: a decoding setting is one tag, not one for each of its values."""
    shallow: dict[str, Any] = {}
    for key, value in flat.items():
        parts = key.split(".")
        name, rest = ".".join(parts[:depth]), ".".join(parts[depth:])
        if rest:
            shallow.setdefault(name, {})[rest] = value
        else:
            shallow[name] = value
    return shallow


def ancestors(stage: str, lock: Mapping[str, Any]) -> set[str]:
    """The stage itself and all whose outputs it rests on."""
    makers = {out["path"]: name for name, entry in lock.items() for out in entry.get("outs", [])}
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            deps = (dep["path"] for dep in lock[name].get("deps", []))
            waiting += [makers[dep] for dep in deps if dep in makers]
    return found


def clipped(values: Mapping[str, Any]) -> dict[str, str]:
    """As MLflow takes them: no odd characters in a name, no value without an end."""
    texts = {_NOT_IN_A_NAME.sub("_", key)[:250]: str(value) for key, value in values.items()}
    note = "… (whole in params.yaml)"
    return {
        k: v if len(v) <= MAX_TEXT else v[: MAX_TEXT - len(note)] + note for k, v in texts.items()
    }


def headline(stage: Stage) -> dict[str, str]:
    """The note that MLflow shows above a run, and whether the model passed its gate."""
    base = read_json(stage.dep("reports/evaluation_base.json"))
    evaluation = read_json(stage.dep("reports/evaluation.json"))
    tuned, verdict = evaluation["tuned"], gate.verdict(evaluation["gate"])
    names = (*evaluation["metrics"], "loss", "perplexity")
    rows = [
        f"| {name} | {base[name]:.4g} | {tuned[name]:.4g} |"
        for name in names
        if base.get(name) is not None and tuned.get(name) is not None
    ]
    table = ["| test split | base | tuned |", "|---|---|---|", *rows]
    words = [f"Gate {verdict}.", "", "The page: artifact `report/index.html`."]
    return {"mlflow.note.content": "\n".join([*table, "", *words]), GATE: verdict}


def machine(stage: Stage) -> dict[str, str]:
    """Return the CPU that trained and the kernels it used, where the training really ran here."""
    cost, lock = timings.read(stage.root).get("train", {}), recorded(stage.root)
    if "cpu" not in cost or recorded_key(lock["train"]) != cost["key"]:
        return {}
    kernels = {f"kernels.{name}": used for name, used in cost["kernels"].items()}
    return {"cpu": cost["cpu"], **kernels}


def metrics(stage: Stage) -> dict[str, float]:
    """The numbers of the JSON reports, and what each stage cost where that is known.

    Scores by kind are there, by language and function not: those are in the table of predictions.
    """
    evaluation = read_json(stage.dep("reports/evaluation.json"))
    base, names = read_json(stage.dep("reports/evaluation_base.json")), evaluation["metrics"]
    facts: dict[str, Any] = {
        "base": _scores(base, names),
        "tuned": _scores(evaluation["tuned"], names),
        "difference": evaluation["difference"],
        "general": evaluation["general"],
        "harness": {
            task: found["metrics"]
            for task, found in evaluation.get("harness", {}).get("tasks", {}).items()
        },
        "data": read_json(stage.dep("reports/format.json"))["splits"],
        "quantization": read_json(stage.dep("reports/quantization.json")),
        "training": read_json(stage.dep("reports/train.json")),
    }
    lock = recorded(stage.root)
    for name, cost in timings.read(stage.root).items():
        if name == "publish":
            continue  # that of the publish before this one: every repetition would change the run
        if name not in lock or recorded_key(lock[name]) != cost["key"]:
            continue  # restored from DVC's cache: this was the cost of other inputs
        for measure in timings.MEASURES:
            if measure in cost:
                facts.setdefault(measure, {})[name] = cost[measure]
    return {_NOT_IN_A_NAME.sub("_", key): float(value) for key, value in _numbers(facts)}


def _scores(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """By kind the headline alone."""
    kinds = facts["by"].get("kind", {})
    by_kind = {
        f"{name} by kind": {kind: scores[name] for kind, scores in kinds.items()}
        for name in names[:1]
    }
    return {**facts, "by": None, **by_kind}


def _numbers(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


def curve(stage: Stage) -> list[Point]:
    """The recorded curve under the names of the live one."""
    files = {"reports/history.csv": "", "reports/validation.csv": "eval_"}
    points = []
    for file, prefix in files.items():
        with stage.dep(file).open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                named = {
                    CURVES[prefix + k]: v
                    for k, v in row.items()
                    if prefix + k in CURVES and v != ""
                }
                points += [
                    Point(name, int(row["step"]), float(value)) for name, value in named.items()
                ]
    return points


def artifacts_digest(lock: Mapping[str, Any]) -> str:
    """Changes when an output of any stage does."""
    outs = {
        out["path"]: out["md5"]
        for name, entry in lock.items()
        if name != "publish"
        for out in entry.get("outs", [])
    }
    return hashlib.sha256(json.dumps(outs, sort_keys=True).encode()).hexdigest()[:16]


def predictions(stage: Stage) -> list[dict[str, Any]]:
    """One row for each test record: base beside tuned."""
    import pyarrow.parquet as pq

    names = read_json(stage.dep("reports/evaluation.json"))["metrics"]
    base = {
        row["id"]: row
        for row in pq.read_table(stage.dep("reports/predictions_base.parquet")).to_pylist()
    }
    return [
        {
            "id": row["id"],
            **json.loads(row["metadata"]),
            "prompt": row["prompt"],
            "reference": row["reference"],
            "base": base[row["id"]]["completion"],
            "tuned": row["completion"],
            **{name: row[name] for name in (*names, "loss")},
        }
        for row in pq.read_table(stage.dep("reports/predictions.parquet")).to_pylist()
    ]


def samples(stage: Stage) -> list[dict[str, Any]]:
    """One row for each completion."""
    lines = stage.dep("reports/samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {
            "prompt": line["messages"][-1]["content"],
            "setting": line["setting"],
            "template": line["template"],
            "model": line["model"],
            "completion": completion,
            "reference": line["reference"],
        }
        for line in map(json.loads, lines)
        for completion in line["completions"]
    ]
