"""Keep the sweep's own run in MLflow, whose children are its trials (`children`).

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
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError, without_secrets
from capas.core.files import write_whole
from capas.sweep.children import (
    TRIAL,
    Children,
    Stores,
    params_of,
    shown_metrics,
    swept_values,
)
from capas.sweep.plan import Plan
from capas.sweep.state import DONE, ENDED, FAILED, RUNNING, State, read_states
from capas.tracking.client import reachable
from capas.tracking.pages import VIEW_TAG, Pages, shared_view
from capas.tracking.run_params import MAX_TEXT
from capas.tracking.store import Store, locked, sqlite_file, sweeps_of, tracking_uri

log = logging.getLogger("capas")
KEY = "sweep_key"
SETTINGS, RESULT, TRACKED = "tracking.json", "result.json", "tracked.json"
ADDRESS = "mlflow.txt"
PAGES = "sweep"  # the folder of the run's artifacts that has the pages
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
    """The sweep's run in MLflow, opened when there is something to write.

    Attributes:
        adopted: the ids of the training runs of the trials, by train_key.
        is_running: whether this process has set the status to RUNNING.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.adopted, self.is_running = plan, dict[str, str](), False
        self._children: Children | None = None

    def look(self, states: list[State]) -> None:
        """Tag the training runs that MLflow has by now, and write the trials that have ended."""
        children = self._opened()
        if is_at_work(states) and not self.is_running:
            children.stores.sweeps.set_status(children.parent, "RUNNING")
            self.is_running = True
        self._adopt(children.stores.trainings, states)
        with self._locked():
            for state in states:
                if state.status in ENDED:
                    children.write(state, self.adopted.get(state.train_key, ""))

    def end(self, result: dict[str, Any] | None, states: list[State]) -> None:
        """End the run with its result; None means that the sweep was stopped."""
        children = self._opened()
        store, swept = children.stores.sweeps, swept_values(states)
        self._share_view(children, (result or {}).get("tags", {}), states)
        if result is not None:
            run = store.client.get_run(children.parent)
            tags = result.get("tags", {})
            store.send_params(run, {name: _listed(values) for name, values in swept.items()})
            store.send_tags(run, {**tags, **_best(tags, states)})
            store.send_metrics(run, {**result.get("metrics", {}), "num_trials": len(states)})
        store.set_status(children.parent, "KILLED" if result is None else result["status"])
        for name in (result or {}).get("pages", []):
            store.client.log_artifact(children.parent, str(self.plan.folder / name), PAGES)

    def _adopt(self, trainings: Store, states: list[State]) -> None:
        """Tag the training runs of the trials; each sweep has a tag of its own."""
        waiting = {state.train_key for state in states if state.train_key} - self.adopted.keys()
        for train_key in sorted(waiting):
            if (found := trainings.find(train_key)) is not None:
                tag = f"sweep.{self.plan.key}"
                trainings.send_tags(found, {tag: _words(self.plan)[:MAX_TEXT]})
                self.adopted[train_key] = found.id

    def _share_view(self, children: Children, tags: dict[str, str], states: list[State]) -> None:
        """Make a view of the trials in MLflow: swept values beside the metrics, as a table and in charts."""
        store, view = children.stores.sweeps, f"sweep-{self.plan.key}"
        shown = shared_view(
            list(swept_values(states)),
            shown_metrics(states),
            search=f"tags.`mlflow.parentRunId` = '{children.parent}'",
            ascending=tags.get("sweep.direction") == "minimize",
        )
        store.client.set_experiment_tag(store.experiment_id, VIEW_TAG + view, shown)
        pages = Pages(tracking_uri(self.plan.home), store.experiment_id)
        address = pages.runs(view, charts=True) + pages.hint()
        write_whole(self.plan.folder / ADDRESS, address + "\n")

    def _opened(self) -> Children:
        if self._children is None:
            settings = json.loads((self.plan.folder / SETTINGS).read_text(encoding="utf-8"))
            name = settings["experiment_name"]
            trainings = Store.open(self.plan.home, name)
            stores = Stores(Store.open(self.plan.home, sweeps_of(name)), trainings)
            with self._locked():
                self._end_abandoned(stores)
                run_id = _find_or_create(stores.sweeps, self.plan)
            self._children = Children(self.plan, stores, run_id)
        return self._children

    def _end_abandoned(self, stores: Stores) -> None:
        """End the runs of sweeps that were killed; earlier versions kept them beside the training runs."""

        def lock(value: str) -> Path:
            return self.plan.lock(f"sweep-{value.partition('-')[0]}")

        for store in stores:
            store.end_abandoned(KEY, lock)
        stores.sweeps.end_abandoned(TRIAL, lock)

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.plan.home, f"sweep-{self.plan.key}", seconds=60)


def is_at_work(states: list[State]) -> bool:
    """Return whether the sweep has run a trial, or does so now, instead of only reading finished ones."""
    return any(state.status in (RUNNING, DONE, FAILED) for state in states)


def _best(tags: dict[str, str], states: list[State]) -> dict[str, str]:
    """Return the swept values of the best trial as tags: {"best.lora.r": "8"}."""
    best = [state for state in states if state.name == tags.get("best.experiment")]
    values = params_of(best[0].overrides) if best else {}
    return {f"best.{name}": values[name] for name in swept_values(states) if name in values}


def _listed(values: list[str]) -> str:
    """Return values as a text that MLflow accepts; a search may have hundreds."""
    text = ", ".join(values)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def address(plan: Plan) -> str | None:
    """Return the MLflow page that compares the trials, or None if the sweep was not tracked."""
    file = plan.folder / ADDRESS
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _find_or_create(store: Store, plan: Plan) -> str:
    words = _words(plan)
    tags = {
        "mlflow.source.name": "stages/sweep.py",
        "mlflow.source.git.commit": plan.commit,
        "sweep.overrides": words[:MAX_TEXT],
    }
    return str(store.only(KEY, plan.key, lambda: f"sweep {words}"[:100], tags).id)


def _words(plan: Plan) -> str:
    return " ".join(plan.words)


def follow(plan: Plan, stdin: int) -> None:
    """Update the parent run until the sweep ends.

    As long as every trial was already there, nothing is written before the result. If MLflow has the result,
    too, it is not contacted.

    Raises:
        CapasError: the store cannot be reached at the end.
    """
    parent, closed, pause = Parent(plan), False, _SECONDS_BETWEEN_LOOKS
    while not closed:
        ready, _, _ = select.select([stdin], [], [], pause)
        closed = bool(ready) and os.read(stdin, 1) == b""
        states = read_states(plan.points)
        if not closed and is_at_work(states):
            seen = _try_to_look(parent, states)
            pause = _SECONDS_BETWEEN_LOOKS if seen else _SECONDS_AFTER_A_FAILURE
    file = plan.folder / RESULT
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if result is None and not (is_at_work(states) or parent.is_running):
        return  # stopped before it ran a trial
    mark = plan.folder / TRACKED
    facts = {
        "store": _identity(plan),
        "result": result,
        "trials": sorted(state.identity for state in states),
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
