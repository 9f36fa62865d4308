"""Bring the recorded result into MLflow: one run for each distinct training.

Reads   what train, evaluate, sample and report left, dvc.lock; reports/timings where they are
Writes  the MLflow run whose tag train_key is this training's; reports/.published, a marker for DVC
Params  tracking

It may run any number of times: what the run has already is left alone, so a result that DVC restored,
and an empty database after `dvc pull`, end up the same as a run that was followed live.

    tag train_key 3f0c...   params lora.r=16 ...   metrics train/loss (a curve), tuned/exact_match ...
"""

import csv
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from capas import timings
from capas.dag import recorded, recorded_key
from capas.errors import CapasError
from capas.params import Params, flatten
from capas.stage import Stage, log, run
from capas.store import Point, Store, locked, reachable, tracking_uri
from capas.tracking import CURVES, run_name

MAX_TEXT = 500  # characters of a param or tag; the artifact params.yaml has them all
ARTIFACTS_TAG = "capas.artifacts"
JSON_REPORTS = {
    "base": "evaluation_base",
    "data": "format",
    "quantization": "quantization",
    "training": "train",
}
FILES = {
    "": ("dvc.lock", "environment.yaml", "params.yaml"),
    "report": ("reports/index.html", "reports/index.es.html", "reports/mask.html"),
    "samples": ("reports/samples.md", "reports/samples.jsonl"),
}


def main(params: Params, stage: Stage) -> None:
    marker = stage.out("reports/.published")
    if not params.tracking.enabled:
        log.info("tracking.enabled is false: nothing to publish")
        marker.write_text("tracking.enabled is false\n")
        return
    if stage.debug:
        log.info("a debug run publishes nothing")
        marker.write_text("debug\n")
        return
    lock = recorded(stage.root)
    key = train_key(stage, lock)
    with locked(stage.root, key, seconds=60):  # the live tracker may still be at its last rows
        store = Store.open(stage.root, params.tracking.experiment_name)
        with reachable(tracking_uri(stage.root)):
            found = store.find_or_create(key, run_name(key))
            publish(store, found, lock, stage)
            store.set_status(found.info.run_id, "FINISHED")
    log.info("MLflow run %s holds this training; look at it with `make ui`", found.info.run_name)
    marker.write_text(f"{key}\n")


def train_key(stage: Stage, lock: Mapping[str, Any]) -> str:
    """That with which the adapter was trained; `dvc commit` may have accepted it under another since.

    Raises:
        CapasError: dvc.lock records no training.
    """
    if "train" not in lock:
        raise CapasError("dvc.lock records no training yet; run `dvc repro`")
    key: str = read_json(stage, "reports/train.json")["train_key"]
    if key != recorded_key(lock["train"]):
        log.info(
            "the training was accepted with `dvc commit`: it stays in its run, train_key %s", key
        )
    return key


def publish(store: Store, found: Any, lock: Mapping[str, Any], stage: Stage) -> None:
    """Whatever the run lacks or has with another value."""
    run_id, have = found.info.run_id, found.data
    of_training, others = values(lock)
    send_params(store, run_id, have, of_training)
    send_tags(store, run_id, have, {**clipped(others), **origin(stage.root), **headline(stage)})
    send_metrics(store, run_id, have, metrics(stage))
    store.log_points(run_id, curve(stage))
    store.client.log_inputs(run_id, datasets=datasets(lock, stage))
    digest = artifacts_digest(lock)
    if have.tags.get(ARTIFACTS_TAG) != digest:
        send_artifacts(store, run_id, stage)
        store.client.set_tag(run_id, ARTIFACTS_TAG, digest)


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
    return of_training, {key: value for key, value in others.items() if key not in of_training}


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


def send_params(store: Store, run_id: str, have: Any, of_training: dict[str, Any]) -> None:
    """MLflow never changes a param. Two values for one adapter (a licence was corrected): a tag says so."""
    from mlflow.entities import Param

    texts = clipped(of_training)
    changed = {k: v for k, v in texts.items() if k in have.params and have.params[k] != v}
    send_tags(store, run_id, have, {f"now.{key}": value for key, value in changed.items()})
    new = [Param(key, value) for key, value in texts.items() if key not in have.params]
    for start in range(0, len(new), 100):  # MLflow's own limit
        store.client.log_batch(run_id, params=new[start : start + 100])


def clipped(values: Mapping[str, Any]) -> dict[str, str]:
    """As MLflow takes them: no odd characters in a name, no value without an end."""
    texts = {re.sub(r"[^\w\-. /]", "_", key)[:250]: str(value) for key, value in values.items()}
    note = "… (whole in params.yaml)"
    return {
        k: v if len(v) <= MAX_TEXT else v[: MAX_TEXT - len(note)] + note for k, v in texts.items()
    }


def send_tags(store: Store, run_id: str, have: Any, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    new = [RunTag(key, value) for key, value in tags.items() if have.tags.get(key) != value]
    for start in range(0, len(new), 100):
        store.client.log_batch(run_id, tags=new[start : start + 100])


def origin(root: Path) -> dict[str, str]:
    """Where the result comes from. Without an experiment of DVC, the run keeps the name it has."""
    commit, changes = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")
    tags = {
        "mlflow.source.name": "dvc.yaml",
        "mlflow.source.git.commit": commit or "unknown",
        "git.dirty": "unknown" if changes is None else str(bool(changes)).lower(),
    }
    if "DVC_EXP_NAME" in os.environ:
        name = os.environ["DVC_EXP_NAME"]
        tags |= {"dvc.experiment": name, "mlflow.runName": name}
    return tags


def git(root: Path, *arguments: str) -> str | None:
    """None outside a git repository."""
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def headline(stage: Stage) -> dict[str, str]:
    """The note that MLflow shows above a run."""
    base, tuned = (
        read_json(stage, "reports/evaluation_base.json"),
        read_json(stage, "reports/evaluation.json")["tuned"],
    )
    rows = [
        f"| {name} | {base[name]:.4g} | {tuned[name]:.4g} |"
        for name in ("exact_match", "valid_json", "loss", "perplexity")
        if base.get(name) is not None and tuned.get(name) is not None
    ]
    table = ["| test split | base | tuned |", "|---|---|---|", *rows]
    return {
        "mlflow.note.content": "\n".join([*table, "", "The page: artifact `report/index.html`."])
    }


def metrics(stage: Stage) -> dict[str, float]:
    """Every number of the JSON reports, and what each stage cost where that is known."""
    evaluation = read_json(stage, "reports/evaluation.json")
    facts: dict[str, Any] = {
        name: read_json(stage, f"reports/{f}.json") for name, f in JSON_REPORTS.items()
    }
    facts |= {"tuned": evaluation["tuned"], "difference": evaluation["difference"]}
    for name, cost in timings.read(stage.root).items():
        for measure in ("seconds", "peak_memory_bytes"):
            facts.setdefault(measure, {})[name] = cost[measure]
    return {
        re.sub(r"[^\w\-. /]", "_", key): float(value)
        for key, value in numbers(facts)
        if not isinstance(value, bool)
    }


def numbers(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value


def send_metrics(store: Store, run_id: str, have: Any, wanted: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    new = [Metric(k, v, now, 0) for k, v in wanted.items() if have.metrics.get(k) != v]
    for start in range(0, len(new), 1000):
        store.client.log_batch(run_id, metrics=new[start : start + 1000])


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


def datasets(lock: Mapping[str, Any], stage: Stage) -> list[Any]:
    """The splits that the model saw, with DVC's md5 of their folder as digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    outs = {out["path"]: out["md5"] for entry in lock.values() for out in entry.get("outs", [])}
    digest = outs["data/formatted"]
    inputs = []
    for split, facts in read_json(stage, "reports/format.json")["splits"].items():
        source = json.dumps({"uri": f"data/formatted/{split}.parquet"})
        profile = json.dumps({"num_rows": facts["num_records"], "num_tokens": facts["num_tokens"]})
        dataset = Dataset(f"data/formatted/{split}", digest, "local", source, profile=profile)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split)]))
    return inputs


def artifacts_digest(lock: Mapping[str, Any]) -> str:
    """Changes when an output of any stage does."""
    outs = {
        out["path"]: out["md5"]
        for name, entry in lock.items()
        if name != "publish"
        for out in entry.get("outs", [])
    }
    return hashlib.sha256(json.dumps(outs, sort_keys=True).encode()).hexdigest()[:16]


def send_artifacts(store: Store, run_id: str, stage: Stage) -> None:
    for folder, files in FILES.items():
        for file in files:
            store.client.log_artifact(run_id, str(stage.root / file), folder or None)
    store.client.log_artifacts(run_id, str(stage.dep("data/models/adapter")), "adapter")
    send_table(store, run_id, "predictions.json", predictions(stage))
    send_table(store, run_id, "samples.json", samples(stage))


def send_table(store: Store, run_id: str, name: str, rows: list[dict[str, Any]]) -> None:
    """What `MlflowClient.log_table` writes, which would append to the table of an earlier publish."""
    import pandas as pd
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    store.client.log_text(run_id, pd.DataFrame(rows).to_json(orient="split", index=False), name)
    tables = json.loads(store.client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    if (entry := {"path": name, "type": "table"}) not in tables:
        store.client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, entry]))


def predictions(stage: Stage) -> list[dict[str, Any]]:
    """One row for each test record: base beside tuned."""
    import pyarrow.parquet as pq

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
            "exact_match": row["exact_match"],
            "loss": row["loss"],
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


def read_json(stage: Stage, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(stage.dep(file).read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    run("publish", main)
