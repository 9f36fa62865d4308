"""Send the rows of a running training to MLflow, as they are written.

    python -m capas.tracking.live_sender follow --key TRAIN_KEY --rows FILE
    python -m capas.tracking.live_sender check   before a training: can its result be published? See `check`

`capas.training.live_rows` starts it beside a training, which appends its log to FILE, one JSON object per
line, the last {"event": "end"}, "paused" or "failed". Standard input is a pipe that closes when the training
process is gone, whatever the reason. If a tracker cannot be reached, this only logs a line: `publish` sends
the whole curve later.
"""

import argparse
import json
import logging
import os
import select
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capas.core.dag import read_yaml
from capas.core.errors import CapasError, without_secrets
from capas.core.worktree import git
from capas.tracking.artifacts import UnusableStoreError
from capas.tracking.client import Point, reachable, start_system_metrics
from capas.tracking.run_params import current_params, distinct_name, name_of
from capas.tracking.store import USER, Store, locked, tracking_uri
from capas.training.live_rows import AWAY, UNUSABLE

log = logging.getLogger("capas")
# A key of Trainer's log -> a metric in MLflow. `publish` gives the recorded curve the same names.
CURVES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "memory_bytes": "train/memory_bytes",
    "epoch": "train/epoch",  # the epoch of each step: the x axis of MLflow's charts is the step
}
_EVALUATED = (
    "eval_"  # any score of an evaluation, one of answers included; not what Trainer measures of it
)
_NOT_SCORES = (
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"),
    *("step", "epoch"),  # columns of reports/validation.csv
)
_SEND_SECONDS, _RETRY_SECONDS = 2.0, 15.0
_END_SECONDS = 3600.0  # how long to try to end a run whose server is gone
_SAMPLE_SECONDS = 5.0  # between two samples of system metrics
_STATUS = {"end": "FINISHED", "paused": "KILLED", "failed": "FAILED"}


def points_of(row: dict[str, Any]) -> list[Point]:
    return [
        Point(curve, int(row["step"]), float(value))
        for name, value in row.items()
        if (curve := curve_of(name)) is not None
    ]


def curve_of(name: str) -> str | None:
    """Return the name in MLflow of a key of Trainer's log, None if it is no curve."""
    score = name.removeprefix(_EVALUATED)
    if score != name:
        return None if score in _NOT_SCORES else f"validation/{score}"
    return CURVES.get(name)


def run_name(store: Store, params: Mapping[str, str]) -> str:
    """Return a name for this training's run: its difference from other runs, and DVC's experiment."""
    experiment = os.environ.get("DVC_EXP_NAME")
    name = distinct_name(params, store.params_by_name(name_of(params)))
    return f"{name} ({experiment})" if experiment else name


def author(root: Path) -> dict[str, str]:
    """Return the tag that MLflow shows as "Created by": git's user name, or else the login name."""
    name = git(root, "config", "user.name", check=False) or os.environ.get("USER")
    return {USER: name} if name else {}


class Follower:
    """A reader of log rows, which keeps the rows not yet sent to MLflow."""

    def __init__(self, root: Path, key: str, rows: Path, experiment_name: str) -> None:
        self.root, self.key, self.rows, self.experiment_name = root, key, rows, experiment_name
        self.event: str | None = None
        self._read, self._waiting = 0, list[Point]()
        self._store: Store | None = None
        self._run_id = ""
        self._monitor: Any = None  # system metrics, while MLflow can be reached
        self._next = 0.0
        # whether MLflow may have the run; whether MLflow has its end
        self.reached, self.ended = False, False

    def read(self) -> None:
        """Read the lines that are complete."""
        with self.rows.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        complete = lines[: lines.rfind(b"\n") + 1]
        self._read += len(complete)
        for line in complete.splitlines():
            row = json.loads(line)
            self.event = row.get("event", self.event)
            self._waiting += points_of(row)

    def send(self, status: str = "RUNNING", now: bool = False) -> None:
        """Send the new rows, at most every two seconds, or every fifteen after a failure."""
        if not now and time.monotonic() < self._next:
            return
        try:
            with reachable(tracking_uri(self.root)):
                self._send(status)
            self._next = time.monotonic() + _SEND_SECONDS
        except (CapasError, OSError) as error:
            self._stop_monitor()
            self._store = None
            self._next = time.monotonic() + _RETRY_SECONDS
            log.warning("training continues without live metrics: %s", error)

    def _send(self, status: str) -> None:
        if self._store is None:
            self._store = Store.open(self.root, self.experiment_name)
            self.reached = True
            params, store = current_params(self.root), self._store
            run = store.find_or_create(self.key, lambda: run_name(store, params))
            self._run_id = run.id
            if not run.params:
                store.send_params(run, params)
                store.send_tags(run, author(self.root))
            self._store.set_status(self._run_id, "RUNNING")
            if status == "RUNNING":
                self._monitor = start_monitor(self._run_id, tracking_uri(self.root))
        if self._waiting:
            self._store.log_points(self._run_id, self._waiting)
            self._waiting = []
        if status != "RUNNING":
            self._stop_monitor()
            self._store.set_status(self._run_id, status)
            self.ended = True

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()  # it warns about metrics that it cannot send
            self._monitor = None


def start_monitor(run_id: str, uri: str) -> Any:
    """Log CPU, memory, disk, network and GPU of this machine as system/... metrics; None if that fails."""
    try:
        return start_system_metrics(run_id, uri, _SAMPLE_SECONDS)
    except Exception as error:  # noqa: BLE001  drivers raise anything; the curve matters more
        log.warning("no system metrics: %s", error)
        return None


def follow(root: Path, key: str, rows: Path, stdin: int) -> str:
    """Follow a training until it ends, and return its final status in MLflow's words."""
    follower = Follower(
        root, key, rows, read_yaml(root / "params.yaml")["tracking"]["experiment_name"]
    )
    with locked(root, key, seconds=60):
        closed = False
        while follower.event is None and not closed:
            ready, _, _ = select.select([stdin], [], [], 0.3)
            closed = bool(ready) and os.read(stdin, 1) == b""
            follower.read()
            if follower.event is None and not closed:
                follower.send()
        status = _STATUS.get(follower.event or "", "KILLED")
        follower.send(status, now=True)
    if follower.reached and not follower.ended:
        end_late(root, key, follower.experiment_name, status)
    return status


def end_late(root: Path, key: str, experiment_name: str, status: str) -> None:
    """End a run that is still running according to MLflow, once its server is reachable again.

    A process that publishes or resumes the training in the meantime does it instead.
    """
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_RETRY_SECONDS)
        try:
            with locked(root, key, seconds=0), reachable(tracking_uri(root)):
                store = Store.open(root, experiment_name)
                run = store.find(key)
                if run is not None and run.status == "RUNNING":
                    store.set_status(run.id, status)
            return
        except (CapasError, OSError) as error:
            log.info("the run could not be marked as ended: %s", error)


def check(root: Path) -> int:
    """Check that the store opens and that its artifacts can be written; print what is wrong.

    Returns:
        The exit code: `live_rows.UNUSABLE` if a package, credentials or a place are missing, so that a later
        `publish` would fail too; `live_rows.AWAY` if nothing answers, which may change; otherwise 0.
    """
    name = read_yaml(root / "params.yaml")["tracking"]["experiment_name"]
    try:
        with reachable(tracking_uri(root)):
            Store.open(root, name).check_artifacts()
    except CapasError as error:
        sys.stdout.write(without_secrets(str(error)))
        return UNUSABLE if isinstance(error, UnusableStoreError) else AWAY
    return 0


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m capas.tracking.live_sender",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("check")
    command = commands.add_parser("follow")
    command.add_argument("--key", required=True)
    command.add_argument("--rows", required=True, type=Path)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="tracking: %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    root = Path.cwd()
    if not read_yaml(root / "params.yaml")["tracking"]["enabled"]:
        log.info("tracking.enabled is false")
        return
    if options.command == "check":
        sys.exit(check(root))
    try:
        log.info(
            "the training ended: %s", follow(root, options.key, options.rows, sys.stdin.fileno())
        )
    except CapasError as error:
        sys.exit(f"tracking: {without_secrets(str(error))}")


if __name__ == "__main__":
    main(sys.argv[1:])
