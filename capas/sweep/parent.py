"""Keep the sweep's own run in MLflow; the training runs of its trials become its children.

    python -m capas.sweep.parent FOLDER

Starting MLflow takes seconds, so a separate process does it alongside the trials. Its standard input closes
when the sweep ends, whatever the reason. If the store cannot be reached, a warning is logged.
"""

import json
import logging
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError, without_secrets
from capas.core.files import write_whole
from capas.sweep.plan import Plan
from capas.sweep.state import CACHED, State, read_states
from capas.tracking.client import reachable
from capas.tracking.pages import DEFAULT_PARAMS, VIEW_TAG, Pages, shared_view
from capas.tracking.store import Store, locked, sqlite_file, tracking_uri

log = logging.getLogger("capas")
KEY = "sweep_key"
SETTINGS, RESULT, TRACKED = "tracking.json", "result.json", "tracked.json"
ADDRESS = "mlflow.txt"
_PARENT = "mlflow.parentRunId"
_SECONDS_BETWEEN_LOOKS, _SECONDS_AFTER_A_FAILURE, _SECONDS_TO_END = 1.0, 15.0, 120.0


@contextmanager
def tracked(plan: Plan, tracking: dict[str, Any]) -> Iterator[None]:
    """Run the MLflow process while the block lasts; if it fails, its output is logged as a warning."""
    write_whole(plan.folder / SETTINGS, json.dumps(tracking))
    (plan.folder / RESULT).unlink(missing_ok=True)
    if not tracking["enabled"]:
        yield
        return
    log_file = plan.folder / "logs/mlflow.log"
    command = [sys.executable, "-m", __name__, str(plan.folder)]
    with log_file.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True
        )
        assert child.stdin is not None
        try:
            yield
        finally:
            child.stdin.close()
            try:
                child.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                log.warning("MLflow is slow; its process continues in the background: %s", log_file)
    if child.returncode:
        log.warning("the sweep is not in MLflow: %s", log_file.read_text(encoding="utf-8").strip())


def finish(plan: Plan, result: dict[str, Any]) -> None:
    """Write the result for the parent run, inside `tracked`; without a result the sweep counts as killed."""
    write_whole(plan.folder / RESULT, json.dumps(result, indent=2) + "\n")


class Parent:
    """The sweep's run in MLflow, opened when there is something to write."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.adopted = plan, dict[str, str]()
        self._store: Store | None = None
        self._run_id = ""

    def look(self, states: list[State]) -> None:
        """Adopt the training runs that MLflow has by now."""
        waiting = {s.train_key for s in states if s.train_key} - self.adopted.keys()
        if not waiting and self._store is not None:
            return
        store = self._opened()
        for train_key in sorted(waiting):
            if (found := store.find(train_key)) is None:
                continue
            tags = {
                _PARENT: self._run_id,
                f"sweep.{self.plan.key}": " ".join(self.plan.words)[:500],
            }
            store.send_tags(found, tags)
            self.adopted[train_key] = found.id

    def end(self, result: dict[str, Any] | None, states: list[State]) -> None:
        """End the run with its result; None means that the sweep was stopped."""
        store = self._opened()
        self._share_view(store, states)
        for name, value in (result or {}).get("metrics", {}).items():
            store.client.log_metric(self._run_id, name, value)
        for name, value in (result or {}).get("tags", {}).items():
            store.client.set_tag(self._run_id, name, value)
        status = "KILLED" if result is None else result["status"]
        store.client.set_terminated(self._run_id, status)

    def _share_view(self, store: Store, states: list[State]) -> None:
        """Make a view of the trials in MLflow: swept values beside the score, as a table and in charts."""
        view = f"sweep-{self.plan.key}"
        params, search = swept_params(states), f"tags.`sweep.{self.plan.key}` LIKE '%'"
        shown = shared_view(params or DEFAULT_PARAMS, ("score", "validation/loss"), search)
        store.client.set_experiment_tag(store.experiment_id, VIEW_TAG + view, shown)
        pages = Pages(tracking_uri(self.plan.home), store.experiment_id)
        address = pages.runs(view, charts=True) + pages.hint()
        write_whole(self.plan.folder / ADDRESS, address + "\n")

    def _opened(self) -> Store:
        if self._store is None:
            settings = json.loads((self.plan.folder / SETTINGS).read_text(encoding="utf-8"))
            store = Store.open(self.plan.home, settings["experiment_name"])
            with locked(self.plan.home, f"sweep-{self.plan.key}", seconds=60):
                store.end_abandoned(KEY, lambda key: self.plan.lock(f"sweep-{key}"))
                self._run_id = _find_or_create(store, self.plan)
            store.client.update_run(self._run_id, status="RUNNING")
            self._store = store
        return self._store


def swept_params(states: list[State]) -> list[str]:
    """Return the names in MLflow of the parameters that have several values in these trials."""
    values: dict[str, set[str]] = {}
    for override in (word for state in states for word in state.overrides):
        key, _, value = override.lstrip("+~").partition("=")
        name = key if "." in key or key == "seed" else f"{key}.preset"
        values.setdefault(name, set()).add(value)
    return sorted(name for name, found in values.items() if len(found) > 1)


def address(plan: Plan) -> str | None:
    """Return the MLflow page that compares the trials, or None if the sweep was not tracked."""
    file = plan.folder / ADDRESS
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _find_or_create(store: Store, plan: Plan) -> str:
    words = " ".join(plan.words)
    tags = {
        "mlflow.source.name": "stages/sweep.py",
        "mlflow.source.git.commit": plan.commit,
        "sweep.overrides": words[:500],
    }
    return str(store.only(KEY, plan.key, lambda: f"sweep {words}"[:100], tags).id)


def follow(plan: Plan, stdin: int) -> None:
    """Update the parent run until the sweep ends.

    If every trial was already there and is tracked, MLflow is not contacted.

    Raises:
        CapasError: the store cannot be reached at the end.
    """
    parent, closed, pause = Parent(plan), False, _SECONDS_BETWEEN_LOOKS
    while not closed:
        ready, _, _ = select.select([stdin], [], [], pause)
        closed = bool(ready) and os.read(stdin, 1) == b""
        states = read_states(plan.points)
        if not closed and any(state.status != CACHED for state in states):
            seen = _try_to_look(parent, states)
            pause = _SECONDS_BETWEEN_LOOKS if seen else _SECONDS_AFTER_A_FAILURE
    file = plan.folder / RESULT
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    mark = plan.folder / TRACKED
    facts = {
        "store": _identity(plan),
        "result": result,
        "keys": sorted(s.train_key for s in states),
    }
    if result and mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == facts:
        return
    with reachable(tracking_uri(plan.home)):
        parent.look(states)
        parent.end(result, states)
    if result and all(state.train_key in parent.adopted for state in states):
        write_whole(mark, json.dumps(facts) + "\n")


def _try_to_look(parent: Parent, states: list[State]) -> bool:
    """Look once and return whether the store was reached; it may be reachable again later."""
    try:
        with reachable(tracking_uri(parent.plan.home)):
            parent.look(states)
    except CapasError as error:
        log.warning("%s", error)
        return False
    return True


def _identity(plan: Plan) -> str:
    """Return the identity of the store; a database that was deleted and made again is a different one."""
    uri = tracking_uri(plan.home)
    file = sqlite_file(uri)
    shown = without_secrets(uri)  # it is written to a file
    return f"{shown} {file.stat().st_ino}" if file is not None and file.exists() else shown


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        follow(Plan.read(Path(sys.argv[1])), sys.stdin.fileno())
    except CapasError as error:
        sys.exit(str(error))
