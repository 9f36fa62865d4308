"""Publish the recorded result to MLflow: one run for each distinct training.

Reads   what train, evaluate, sample and report wrote, dvc.lock; reports/timings if they exist
Writes  the MLflow run whose tag train_key is this training's; reports/.published, a marker for DVC
Params  tracking; evaluation, generation.system, hardware, model, quantization: for users who load the model

It may run any number of times, because what the run has already is left alone. A result that DVC restored,
and an empty database after `dvc pull`, end up the same as a run that was followed live.

    tag train_key 3f0c...   params lora.r=16 ...   metrics train/loss (a curve), score, tuned.loss ...
"""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capas.core.dag import recorded, recorded_key
from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.params import Params
from capas.core.stage import Stage, log, run
from capas.tracking import lineage, run_content
from capas.tracking.live_sender import run_name
from capas.tracking.run_content import Times
from capas.tracking.run_params import recorded_params
from capas.tracking.store import (
    ARTIFACTS,
    EXPERIMENT,
    MODEL,
    TRAIN_KEY,
    USER,
    Store,
    locked,
    reachable,
    tracking_uri,
)
from capas.tracking.ui import Pages
from capas.use import mlflow_model
from capas.use.card import write_card

MODEL_TAG = "capas.model"
INITIAL_TAG = "initial_adapter.sha256"
FILES = {
    "": ("dvc.lock", "environment.yaml", "params.yaml", "reports/certificate.json"),
    "report": tuple(f"reports/{name}.html" for name in ("index", "index.es", "mask", "mask.es")),
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
    with locked(stage.root, key, seconds=60):  # the live tracker may still be sending its last rows
        store = Store.open(stage.root, params.tracking.experiment_name)
        with reachable(tracking_uri(stage.root)):
            store.check_artifacts()
            costs = run_content.costs(stage, lock)
            texts, times = recorded_params(lock), run_content.times(stage, costs)
            found = store.find_or_create(
                key, lambda: run_name(store, texts), times and times.started
            )
            publish(store, found, lock, costs, params, stage)
            end(store, found.info.run_id, times)
    pages = Pages(tracking_uri(stage.root), store.experiment_id)
    log.info("the run in MLflow: %s%s", pages.run(found.info.run_id), pages.hint())
    marker.write_text(f"{key}\n")


def end(store: Store, run_id: str, times: Times | None) -> None:
    """Mark the run as finished, at the time when the training ended: publishing may come much later."""
    if times is None or times.ended is not None:
        store.set_status(run_id, "FINISHED", times and times.ended)
    elif store.client.get_run(run_id).info.status != "FINISHED":
        # without an end, and so without a duration
        store.client.update_run(run_id, status="FINISHED")


def train_key(stage: Stage, lock: Mapping[str, Any]) -> str:
    """Return the key under which the adapter was trained; a later `dvc commit` may have recorded another.

    Raises:
        CapasError: dvc.lock records no training.
    """
    if "train" not in lock:
        raise CapasError("dvc.lock records no training yet; run `dvc repro`")
    key: str = read_json(stage.dep("reports/train.json"))["train_key"]
    if key != recorded_key(lock["train"]):
        log.info(
            "training was accepted with `dvc commit`: the result stays in its run, train_key %s",
            key,
        )
    return key


def publish(
    store: Store,
    found: Any,
    lock: Mapping[str, Any],
    costs: run_content.Costs,
    params: Params,
    stage: Stage,
) -> None:
    """Send everything that the run lacks or has with another value."""
    run_id, have = found.info.run_id, found.data
    store.send_params(run_id, have, recorded_params(lock))
    tags = {**run_content.machine(costs), **run_content.headline(stage)}
    tags |= {} if USER in have.tags else lineage.author(stage, ran_here="train" in costs)
    if experiment := lineage.experiment(stage, have.tags[TRAIN_KEY]):
        tags[EXPERIMENT] = experiment
        if experiment not in found.info.run_name:
            tags["mlflow.runName"] = f"{found.info.run_name} ({experiment})"
    if initial := initial_adapter(stage):
        tags[INITIAL_TAG] = initial["sha256"]
    store.send_tags(run_id, have.tags, tags)
    send_metrics(store, run_id, have, run_content.metrics(stage, costs))
    store.log_points(run_id, run_content.curve(stage))
    store.client.log_inputs(run_id, datasets=datasets(lock, stage))
    digest = run_content.artifacts_digest(lock)
    is_new = have.tags.get(ARTIFACTS) != digest
    lineage.send(store, found, stage, is_new)
    if is_new:
        send_artifacts(store, run_id, costs, stage)
        store.client.set_tag(run_id, ARTIFACTS, digest)
    answering = f"{digest}-{mlflow_model.code_digest(stage)}"  # the code travels with the model
    if have.tags.get(MODEL_TAG) != answering:
        send_model(store, found, run_content.values_of_training(lock), params, stage)
        store.client.set_tag(run_id, MODEL_TAG, answering)


def initial_adapter(stage: Stage) -> dict[str, Any] | None:
    """Return name, revision and SHA-256 of the adapter that the training started from, if any."""
    found: dict[str, Any] = read_json(stage.dep("reports/certificate.json"))
    return found.get("initial_adapter")


def send_metrics(store: Store, run_id: str, have: Any, wanted: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    new = [Metric(k, v, now, 0) for k, v in wanted.items() if have.metrics.get(k) != v]
    for start in range(0, len(new), 1000):
        store.client.log_batch(run_id, metrics=new[start : start + 1000])


def datasets(lock: Mapping[str, Any], stage: Stage) -> list[Any]:
    """Return the splits that the model saw as inputs of the run, with DVC's md5 of their folder as digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    outs = {out["path"]: out["md5"] for entry in lock.values() for out in entry.get("outs", [])}
    digest = outs["data/formatted"]
    inputs = []
    for split, facts in read_json(stage.dep("reports/format.json"))["splits"].items():
        source = json.dumps({"uri": f"data/formatted/{split}.parquet"})
        profile = json.dumps({"num_rows": facts["num_records"], "num_tokens": facts["num_tokens"]})
        dataset = Dataset(f"data/formatted/{split}", digest, "local", source, profile=profile)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split)]))
    return inputs


def send_artifacts(store: Store, run_id: str, costs: run_content.Costs, stage: Stage) -> None:
    for folder, files in FILES.items():
        for file in files:
            store.client.log_artifact(run_id, str(stage.root / file), folder or None)
    store.client.log_dict(run_id, run_content.numbers(stage, costs), "numbers.json")
    send_table(store, run_id, "predictions.json", run_content.predictions(stage))
    send_table(store, run_id, "samples.json", run_content.samples(stage))


def send_model(
    store: Store, found: Any, of_training: Mapping[str, Any], params: Params, stage: Stage
) -> None:
    """Send the adapter with its card, for PEFT and servers, and as a model that MLflow loads."""
    run_id, key = found.info.run_id, found.data.tags[TRAIN_KEY]
    facts = mlflow_model.served_facts(
        params.model,
        params.hardware,
        params.quantization,
        params.evaluation,
        params.generation,
        stage,
    )
    card = write_card(
        run_id,
        key,
        of_training,
        facts,
        read_json(stage.dep("data/raw") / "source.json"),
        read_json(stage.dep("reports/evaluation_base.json")),
        read_json(stage.dep("reports/evaluation.json")),
        initial_adapter(stage),
    )
    with tempfile.TemporaryDirectory(prefix="capas-model-") as folder:
        data, model = Path(folder, "data"), Path(folder, MODEL)
        mlflow_model.write_data(data, card, facts, stage)
        store.client.log_artifacts(run_id, str(data / "adapter"), "adapter")
        mlflow_model.save_model(model, data, key, found, stage, facts)
        store.client.log_artifacts(run_id, str(model), MODEL)


def send_table(store: Store, run_id: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Send a table as `MlflowClient.log_table` does, which would append to that of an earlier publish."""
    import pandas as pd
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    store.client.log_text(run_id, pd.DataFrame(rows).to_json(orient="split", index=False), name)
    tables = json.loads(store.client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    if (entry := {"path": name, "type": "table"}) not in tables:
        store.client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, entry]))


if __name__ == "__main__":
    run("publish", main)
