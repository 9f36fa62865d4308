"""Publish the recorded result to MLflow: one run for each distinct training.

Reads   what train, evaluate, sample and report wrote, dvc.lock; reports/timings if they exist
Writes  the MLflow run whose tag train_key is this training's; reports/.published, a marker for DVC
Params  tracking; evaluation, generation.system, hardware, model, quantization: for users who load the model

It may run any number of times, because what the run has already is left alone. A result that DVC restored,
and an empty database after `dvc pull`, end up the same as a run that was followed live.

    tag train_key 3f0c...   params lora.r=16 ...   metrics train/loss (a curve), score, tuned.loss ...
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capas.core.dag import recorded, recorded_key
from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.params import Params
from capas.core.stage import Stage, log, run
from capas.tracking import lineage, run_content
from capas.tracking.client import Point, Run, Split, reachable
from capas.tracking.live_sender import run_name
from capas.tracking.pages import Pages
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
    tracking_uri,
)
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
            end(store, found.id, times)
    pages = Pages(tracking_uri(stage.root), store.experiment_id)
    log.info("the run in MLflow: %s%s", pages.run(found.id), pages.hint())
    marker.write_text(f"{key}\n")


def end(store: Store, run_id: str, times: Times | None) -> None:
    """Mark the run as finished, at the time when the training ended: publishing may come much later."""
    if times is None or times.ended is not None:
        store.set_status(run_id, "FINISHED", times and times.ended)
    elif store.client.get_run(run_id).status != "FINISHED":
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
    found: Run,
    lock: Mapping[str, Any],
    costs: run_content.Costs,
    params: Params,
    stage: Stage,
) -> None:
    """Send everything that the run lacks or has with another value."""
    store.send_params(found, recorded_params(lock))
    tags = {**run_content.machine(costs), **run_content.headline(stage)}
    tags |= {} if USER in found.tags else lineage.author(stage, ran_here="train" in costs)
    if experiment := lineage.experiment(stage, found.tags[TRAIN_KEY]):
        tags[EXPERIMENT] = experiment
        if experiment not in found.name:
            tags["mlflow.runName"] = f"{found.name} ({experiment})"
    if initial := initial_adapter(stage):
        tags[INITIAL_TAG] = initial["sha256"]
    store.send_tags(found, tags)
    numbers = run_content.metrics(stage, costs)
    changed = [Point(k, 0, v) for k, v in numbers.items() if found.metrics.get(k) != v]
    store.client.send_points(found.id, changed)
    store.log_points(found.id, run_content.curve(stage))
    store.client.send_splits(found.id, splits(lock, stage))
    digest = run_content.artifacts_digest(lock)
    is_new = found.tags.get(ARTIFACTS) != digest
    lineage.send(store, found, stage, is_new)
    if is_new:
        send_artifacts(store, found.id, costs, stage)
        store.client.set_tag(found.id, ARTIFACTS, digest)
    answering = f"{digest}-{mlflow_model.code_digest(stage)}"  # the code travels with the model
    if found.tags.get(MODEL_TAG) != answering:
        send_model(store, found, run_content.values_of_training(lock), params, stage)
        store.client.set_tag(found.id, MODEL_TAG, answering)


def initial_adapter(stage: Stage) -> dict[str, Any] | None:
    """Return name, revision and SHA-256 of the adapter that the training started from, if any."""
    found: dict[str, Any] = read_json(stage.dep("reports/certificate.json"))
    return found.get("initial_adapter")


def splits(lock: Mapping[str, Any], stage: Stage) -> list[Split]:
    """Return the splits that the model saw, with DVC's md5 of their folder as digest."""
    outs = {out["path"]: out["md5"] for entry in lock.values() for out in entry.get("outs", [])}
    found = read_json(stage.dep("reports/format.json"))["splits"]
    return [
        Split(name, outs["data/formatted"], facts["num_records"], facts["num_tokens"])
        for name, facts in found.items()
    ]


def send_artifacts(store: Store, run_id: str, costs: run_content.Costs, stage: Stage) -> None:
    for folder, files in FILES.items():
        for file in files:
            store.client.log_artifact(run_id, str(stage.root / file), folder or None)
    store.client.log_dict(run_id, run_content.numbers(stage, costs), "numbers.json")
    store.client.send_table(run_id, "predictions.json", run_content.predictions(stage))
    store.client.send_table(run_id, "samples.json", run_content.samples(stage))


def send_model(
    store: Store, found: Run, of_training: Mapping[str, Any], params: Params, stage: Stage
) -> None:
    """Send the adapter with its card, for PEFT and servers, and as a model that MLflow loads."""
    run_id, key = found.id, found.tags[TRAIN_KEY]
    facts = mlflow_model.served_facts(params, stage.root, stage.dep)
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


if __name__ == "__main__":
    run("publish", main)
