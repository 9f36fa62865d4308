"""Open a tuned model for use: the workspace's, or that of a run in MLflow."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.core.dag import ancestors, read_yaml, recorded
from capas.core.errors import CapasError
from capas.core.files import read_json, write_json
from capas.core.params import Params
from capas.core.records import FORMATTED, RAW, read_records
from capas.evaluation.prompts import held_out_prompts
from capas.tracking import runs
from capas.tracking.client import reachable
from capas.tracking.store import MODEL, existing, tracking_uri
from capas.use import mlflow_model
from capas.use.served_model import messages_of

NUM_PROMPTS = 4
_PRESET = "preset"
SERVED = Path(MODEL, "data/data")  # MLflow's place for the folder of `capas.use.mlflow_model`
_MADE = (
    mlflow_model.ADAPTER,
    mlflow_model.QUANTIZED,
    "data/formatted",
    "data/raw",
    "reports/quantization.json",
)


@dataclass(frozen=True)
class Tuned:
    """A tuned model with some prompts.

    Attributes:
        folder: a folder that `served_model.Served` reads.
        prompts: conversations that end with a message to answer.
        run_id: the MLflow run; None for the workspace's own model.
    """

    name: str
    folder: Path
    params: Params
    prompts: list[list[dict[str, Any]]]
    run_id: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", metavar="RUN", help="use a run of MLflow instead of the workspace's result"
    )


def bounded(kind: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    """Return a type for `add_argument(type=...)`: a number from `low` to `high`, and not NaN."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected a finite number >= {low}")
        return value

    return number


def say(text: str) -> None:
    """Write a message to the user on standard error, apart from a command's output."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def tuned(root: Path, run: str | None) -> Iterator[Tuned]:
    """Yield the model, while the block lasts.

    Args:
        root: the repository.
        run: a word for `capas.tracking.runs.find`, or None for the workspace's own model.

    Raises:
        CapasError: there is no such model.
    """
    if not (root / "dvc.yaml").exists():
        raise CapasError(f"{root} has no dvc.yaml; start it in the repository's top folder")
    with TemporaryDirectory(prefix="capas-") as folder:
        if run is None:
            yield _of_workspace(root, Path(folder))
        else:
            yield _of_run(root, run, Path(folder))


def _of_workspace(root: Path, folder: Path) -> Tuned:
    lock = recorded(root)
    if "train" not in lock:
        raise CapasError(
            "no trained model in this workspace. Run `dvc repro`, or choose a run with --run"
        )
    for path in _MADE:
        if not (root / path).exists():
            raise CapasError(f"{path} is missing. Restore it with `dvc checkout` or `dvc repro`")
    values = recorded_values(root, lock)
    facts = mlflow_model.served_facts(Params(values), root, root.joinpath)
    # the base's weights are here, whatever their size
    facts["base"] |= {"packed": True, "quantization": None}
    write_json(folder / "served.json", facts)
    (folder / "adapter").symlink_to(root / mlflow_model.ADAPTER)
    (folder / "base").symlink_to(root / mlflow_model.QUANTIZED)
    (folder / "chat.json").symlink_to(root / "data/formatted/chat.json")
    formatted = read_records(root / "data/formatted/test.parquet", FORMATTED)
    raw = read_records(root / "data/raw/test.parquet", RAW)
    prompts = held_out_prompts(raw, formatted, NUM_PROMPTS)
    return Tuned("the workspace", folder, Params(values), [prompt.messages for prompt in prompts])


def recorded_values(root: Path, lock: Mapping[str, Any]) -> dict[str, Any]:
    """Return the params with which the stages ran; for stages that have not run yet, those of params.yaml."""
    return ran_with(read_yaml(root / "params.yaml"), lock)


def ran_with(values: Mapping[str, Any], lock: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` of params.yaml, replaced by the values that the stages of `lock` recorded.

    If a later stage has not run again since, the value of the earlier stage counts. No stage that computes
    reads the name of an option (`preset`): it is taken from params.yaml if the group's values agree.
    """
    found = deepcopy(dict(values))
    for name in sorted(lock, key=lambda stage: -len(ancestors(stage, lock))):
        entry = lock[name]
        for dotted, value in entry.get("params", {}).get("params.yaml", {}).items():
            *groups, leaf = dotted.split(".")
            target = found
            for group in groups:
                target = target.setdefault(group, {})
            target[leaf] = deepcopy(value)
    for group, now in values.items():
        if isinstance(now, Mapping) and _PRESET in now:
            as_now = {**found[group], _PRESET: now[_PRESET]}
            if as_now == now:
                found[group] = as_now
    return found


def _of_run(root: Path, word: str, folder: Path) -> Tuned:
    client = existing(root)
    with reachable(tracking_uri(root)):
        run = runs.find(client, word, root)
        there = {file.path for file in client.list_artifacts(run.id)}
        if MODEL not in there:
            raise CapasError(
                f"run {run.name} has no model because publishing did not finish. Check out "
                "its commit and run `dvc repro publish`"
            )
        for name in (MODEL, "params.yaml"):
            client.download_artifacts(run.id, name, str(folder))
    data = folder / SERVED
    facts, example = read_json(data / "served.json"), folder / MODEL / "input_example.json"
    rows = json.loads(example.read_text(encoding="utf-8"))
    asked = [dict(zip(rows["columns"], row, strict=True)) for row in rows["data"]]
    prompts = [messages_of(row, facts["system"], facts["role"]) for row in asked]
    params = Params(read_yaml(folder / "params.yaml"))
    name, run_id = run.name, run.id
    return Tuned(f"run {name} ({run_id})", data, params, prompts, run_id)
