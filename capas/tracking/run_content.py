"""Turn a recorded result into the contents of an MLflow run: params, tags, metrics, curve and tables."""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capas.core import timings
from capas.core.dag import ancestors
from capas.core.files import read_json
from capas.core.params import flatten
from capas.core.stage import PARAMS, Stage
from capas.core.worktree import git
from capas.evaluation import gate
from capas.evaluation.names import LABEL, LABEL_SCORES
from capas.evaluation.names import headline as headline_of
from capas.tracking.client import Point
from capas.tracking.live_sender import points_of
from capas.tracking.run_params import metric_name
from capas.tracking.store import GATE

Costs = Mapping[str, Mapping[str, Any]]  # stage -> its costs, see `timings.read`


def values_of_training(lock: Mapping[str, Any]) -> dict[str, Any]:
    """Return the params, package versions and code digests that led to the adapter, by dotted key."""
    led_to_it = ancestors("train", lock)
    found: dict[str, Any] = {}
    for stage in filter(led_to_it.__contains__, lock):
        for file, declared in lock[stage].get("params", {}).items():
            prefix = "" if file == PARAMS else f"{Path(file).stem}."
            found |= {prefix + key: value for key, value in flatten(declared).items()}
    return found


def headline(stage: Stage) -> dict[str, str]:
    """Return the note that MLflow shows above a run, and whether the model passed its gate."""
    base = read_json(stage.dep("reports/evaluation_base.json"))
    evaluation = read_json(stage.dep("reports/evaluation.json"))
    tuned, verdict = evaluation["tuned"], gate.verdict(evaluation["gate"])
    shown = (*evaluation["metrics"], *LABEL_SCORES, "loss", "perplexity")
    rows = [
        f"| {name} | {base[name]:.4g} | {tuned[name]:.4g} |"
        for name in shown
        if base.get(name) is not None and tuned.get(name) is not None
    ]
    table = ["| test split | base | tuned |", "|---|---|---|", *rows]
    words = [
        _in_a_sentence(base, evaluation),
        f"Gate {verdict}. The page: artifact `report/index.html`.",
    ]
    return {"mlflow.note.content": "\n\n".join([*words, "\n".join(table)]), GATE: verdict}


def _in_a_sentence(base: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    name, tuned = headline_of(evaluation["metrics"]), evaluation["tuned"]
    beside = [f"base {base[name]:.4g}"] if base.get(name) is not None else []
    if base.get("nearest") and name in base["nearest"]:
        beside.append(f"{gate.BASELINES[gate.NEAREST]} {base['nearest'][name]:.4g}")
    if base.get("majority"):
        beside.append(f"{gate.BASELINES[gate.MAJORITY]} {base['majority'][name]:.4g}")
    text = (
        f"**{name} {tuned[name]:.4g}** on {tuned['num_records']} test records ({', '.join(beside)})"
    )
    if gain := evaluation["difference"].get(name):
        share = f"{evaluation['confidence_fraction']:.0%}"
        interval = f"{share} interval {gain['low']:.4g} to {gain['high']:.4g}"
        text += f"; difference to the base {gain['mean']:+.4g}, {interval}"
    return f"{text}."


def machine(costs: Costs) -> dict[str, str]:
    """Return the CPU that trained and the kernels it used, if the training ran here."""
    cost = costs.get("train", {})
    if "cpu" not in cost:
        return {}
    kernels = {f"kernels.{name}": used for name, used in cost["kernels"].items()}
    return {"cpu": cost["cpu"], **kernels}


def metrics(stage: Stage, costs: Costs) -> dict[str, float]:
    """Return the numbers that people compare between runs, under names without a slash.

    MLflow makes a section of charts from the part of a name before a slash. Only the curves have one, so that
    they come first. `numbers` has the rest.
    """
    evaluation = read_json(stage.dep("reports/evaluation.json"))
    base = read_json(stage.dep("reports/evaluation_base.json"))
    tuned, general, own = evaluation["tuned"], evaluation["general"], evaluation["metrics"]
    measures = _by_measure(costs)
    seconds = measures.get("seconds", {})
    compared: dict[str, Any] = {
        "tuned": _only(tuned, (*own, *_SCORES))
        | {f"{name} by kind": v for name, v in _by_kind(tuned, own)},
        "base": _only(base, (*own, *_SCORES)),
        "nearest": _only(base.get("nearest") or {}, (*own, *LABEL_SCORES)),
        "majority": _only(base.get("majority") or {}, (LABEL, *LABEL_SCORES)),
        "difference": {name: _only(of, _INTERVAL) for name, of in evaluation["difference"].items()},
        "general": {
            **{
                model: _only(general[model], ("loss",))
                for model in ("base", "tuned")
                if model in general
            },
            "difference": _only(general.get("difference") or {}, _INTERVAL),
        },
        "harness": _harness(evaluation),
        "quantization": _only(
            read_json(stage.dep("reports/quantization.json")), ("relative_error_mean",)
        ),
        "seconds": {
            **_only(seconds, ("train", "evaluate")),
            "all_stages": sum(seconds.values()) or None,
        },
        **{
            measure: _only(of, ("train",))
            for measure, of in measures.items()
            if measure != "seconds"
        },
    }
    if own:  # a loss is not a score: lower is better
        compared |= {"score": tuned.get(own[0]), "base_score": base.get(own[0])}
    return _numbers(compared)


def numbers(stage: Stage, costs: Costs) -> dict[str, float]:
    """Return every number in the JSON reports, and the costs of each stage if they are known."""
    evaluation = read_json(stage.dep("reports/evaluation.json"))
    return _numbers(
        {
            "base": read_json(stage.dep("reports/evaluation_base.json")),
            **{k: evaluation[k] for k in ("tuned", *_DIFFERENCES, "general") if k in evaluation},
            "harness": _harness(evaluation),
            "data": read_json(stage.dep("reports/format.json"))["splits"],
            "quantization": read_json(stage.dep("reports/quantization.json")),
            "training": read_json(stage.dep("reports/train.json")),
            **_by_measure(costs),
        }
    )


_SCORES = (
    *("loss", "perplexity", "token_accuracy", "stop_rate", "empty_rate", "control_token_rate"),
    *("copied_value_rate", *LABEL_SCORES),
)
_INTERVAL = ("mean", "low", "high")
_DIFFERENCES = ("difference", "difference_to_nearest", "difference_to_majority")


def _only(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: facts[name] for name in names if name in facts}


def _by_kind(tuned: Mapping[str, Any], own: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    kinds = tuned["by"].get("kind", {})
    for name in own[:1]:
        yield name, {kind: scores[name] for kind, scores in kinds.items()}


def _harness(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    tasks = evaluation.get("harness", {}).get("tasks", {})
    return {task: found["metrics"] for task, found in tasks.items()}


def costs(stage: Stage, lock: Mapping[str, Any]) -> Costs:
    """Return the costs of the stages that ran here with the recorded inputs.

    publish is left out: its cost is that of the previous time, and every repetition would change the run.
    """
    found = timings.matching(timings.read(stage.root), lock)
    return {name: cost for name, cost in found.items() if name != "publish"}


def _by_measure(costs: Costs) -> dict[str, dict[str, float]]:
    """Return {measure: {stage: value}}."""
    found: dict[str, dict[str, float]] = {}
    for name, cost in costs.items():
        for measure in filter(cost.__contains__, timings.MEASURES):
            found.setdefault(measure, {})[name] = cost[measure]
    return found


def _numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return {"tuned.loss": 0.5, ...}, without texts, booleans and missing values."""
    return {
        metric_name(key).replace("/", "."): float(value)
        for key, value in flatten(facts).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class Times(NamedTuple):
    """The start and the end of a training, in milliseconds since 1970; None if not known."""

    started: int
    ended: int | None


def times(stage: Stage, costs: Costs) -> Times | None:
    """Return when the training ran here or, if it was pulled, when its dvc.lock was committed."""
    cost = costs.get("train", {})
    if "ended" in cost:
        ended = int(1000 * cost["ended"])
        return Times(ended - int(1000 * cost["seconds"]), ended)
    committed = git(stage.root, "log", "-1", "--format=%ct", "--", "dvc.lock", check=False)
    return Times(1000 * int(committed), None) if committed else None


def curve(stage: Stage) -> list[Point]:
    """Return the recorded curve under the names of the live one."""
    files = {"reports/history.csv": "", "reports/validation.csv": "eval_"}
    points = []
    for file, prefix in files.items():
        with stage.dep(file).open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                named = {prefix + name: value for name, value in row.items() if value != ""}
                points += points_of({**named, "step": row["step"]})
    return points


def artifacts_digest(lock: Mapping[str, Any]) -> str:
    """Return a digest that changes when an output of any stage changes."""
    outs = {
        out["path"]: out["md5"]
        for name, entry in lock.items()
        if name != "publish"
        for out in entry.get("outs", [])
    }
    return hashlib.sha256(json.dumps(outs, sort_keys=True).encode()).hexdigest()[:16]


def predictions(stage: Stage) -> list[dict[str, Any]]:
    """Return one row for each test record, with the answers of base and tuned model."""
    import pyarrow.parquet as pq

    names = read_json(stage.dep("reports/evaluation.json"))["metrics"]
    base = {
        row["id"]: row
        for row in pq.read_table(stage.dep("reports/predictions_base.parquet")).to_pylist()
    }
    return [
        {
            "prompt": row["prompt"],
            "reference": row["reference"],
            "tuned": row["completion"],
            "base": base[row["id"]]["completion"],
            **{name: row[name] for name in (*names, "loss")},
            "id": row["id"],
            **json.loads(row["metadata"]),
        }
        for row in pq.read_table(stage.dep("reports/predictions.parquet")).to_pylist()
    ]


def samples(stage: Stage) -> list[dict[str, Any]]:
    """Return one row for each completion."""
    lines = stage.dep("reports/samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {
            "prompt": line["messages"][-1]["content"],
            "model": line["model"],
            "completion": completion,
            "reference": line["reference"],
            "setting": line["setting"],
            "template": line["template"],
        }
        for line in map(json.loads, lines)
        for completion in line["completions"]
    ]
