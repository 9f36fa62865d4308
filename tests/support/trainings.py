"""Trainings of a tiny model: whole ones, stopped ones, and in a process of their own."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import holding
import pytest
from tiny import REPOSITORY, run_stage, write_workspace

from stages import quantize_model, train_lora

ADAPTER = "data/models/adapter/adapter_model.safetensors"


RESULTS = (ADAPTER, "data/models/adapter/adapter_config.json")


RESULTS += tuple(f"reports/{name}" for name in ("train.json", "history.csv", "validation.csv"))
RESULTS += ("reports/validation_records.parquet",)


def prepared(root: Path, *overrides: str) -> Path:
    """As it stands before train."""
    root.mkdir(parents=True, exist_ok=True)
    return write_workspace(root, overrides)


def train(root: Path, *overrides: str, quantize: bool = False) -> Path:
    prepared(root, *overrides)
    if quantize:
        run_stage("quantize", quantize_model.main, root)
    run_stage("train", train_lora.main, root)
    return root


def history(root: Path, name: str = "history") -> list[dict[str, float]]:
    with (root / f"reports/{name}.csv").open() as lines:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]


def results(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in RESULTS}


def run_in_process(
    root: Path, script: str = "stages/train_lora.py", **env: str
) -> "subprocess.Popen[str]":
    """The stage as DVC runs it."""
    return subprocess.Popen(
        [sys.executable, script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_until(root: Path, step: int, **env: str) -> "subprocess.Popen[str]":
    """The stage, which now waits behind that step for a signal, or for HELD to go: neither comes too late."""
    held = root / holding.HELD
    held.unlink(missing_ok=True)
    process = run_in_process(root, holding.__file__, **env, **{holding.AT: str(step)})
    wait_for(held.exists, process)
    return process


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stopped_once(root: Path, step: int, *options: str) -> Path:
    """A training that is stopped after `step` and run again."""
    prepared(root, *options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("capas.training.callbacks.LiveRows.on_log", stop_after(step))
        run_stage("train", train_lora.main, root)
    run_stage("train", train_lora.main, root)
    return root


def stop_after(step: int) -> Callable[..., None]:
    def on_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= step:
            raise KeyboardInterrupt

    return on_log
