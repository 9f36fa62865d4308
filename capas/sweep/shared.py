"""Run a stage with the same inputs once, however many trials and workers need it.

Each trial locks the stages that the cache does not hold yet. All trials lock in the same order, so no two
wait for each other. A lock is released as soon as DVC has recorded the stage; a trial that waited for it
then finds the stage in the cache.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from capas.core.dag import StageSpec, recorded
from capas.core.files import write_whole
from capas.core.locks import BusyError, exclusive
from capas.core.params import select
from capas.sweep.plan import Plan, digest

_OF_THE_WORKSPACE = ("compose", "publish")  # stages that run in every workspace


def stage_keys(values: dict[str, Any], inputs: str, root: Path) -> dict[str, str]:
    """Return {stage: digest of its inputs} before anything runs: its params and the stages above it."""
    return keys_of(StageSpec.read_all(root), values, inputs)


def keys_of(specs: Mapping[str, StageSpec], values: dict[str, Any], inputs: str) -> dict[str, str]:
    """Return {stage: digest of its inputs}, like `stage_keys`, for a dvc.yaml that is already read."""
    makers = {out: name for name, spec in specs.items() for out in spec.outs}
    keys: dict[str, str] = {}

    def key(name: str) -> str:
        if name not in keys:
            spec = specs[name]
            above = sorted({key(makers[dep]) for dep in spec.deps if dep in makers})
            params = select(values, spec.keys)
            keys[name] = digest(inputs, spec.cmd, params, above)
        return keys[name]

    return {name: key(name) for name in specs if name not in _OF_THE_WORKSPACE}


class SharedStages:
    """The locks that a trial holds while its pipeline runs in the workspace `work`."""

    def __init__(self, plan: Plan, values: dict[str, Any], work: Path) -> None:
        self._keys = stage_keys(values, plan.inputs, work)
        self._plan, self._work = plan, work
        self._held: dict[str, ExitStack] = {}

    @contextmanager
    def held(self, waits: Callable[[str], None]) -> Iterator[None]:
        """Lock all stages that the cache lacks; `waits(stage)` is called if another trial runs one."""
        try:
            for stage in self._keys:
                self._take(stage, waits)
            yield
        finally:
            for lock in self._held.values():
                lock.close()

    def finished(self, stage: str) -> None:
        """Release a stage that DVC has recorded in the workspace: trials that wait for it may continue."""
        if stage not in self._held:
            return
        outs = recorded(self._work).get(stage, {}).get("outs", [])
        cached = [o["md5"] for o in outs if "md5" in o and self._plan.stored(o["md5"]).exists()]
        if cached:
            write_whole(self._mark(stage), json.dumps(cached))
        self._held.pop(stage).close()

    def _take(self, stage: str, waits: Callable[[str], None]) -> None:
        file, lock = self._plan.lock(f"stage-{self._keys[stage]}"), ExitStack()
        if self._is_cached(stage):
            return
        try:
            lock.enter_context(exclusive(file, seconds=0))
        except BusyError:
            waits(stage)
            lock.enter_context(exclusive(file))
        if self._is_cached(stage):
            lock.close()
        else:
            self._held[stage] = lock

    def _is_cached(self, stage: str) -> bool:
        mark = self._mark(stage)
        return mark.exists() and all(
            self._plan.stored(md5).exists() for md5 in json.loads(mark.read_text())
        )

    def _mark(self, stage: str) -> Path:
        return self._plan.base / "done" / f"{self._keys[stage]}.json"
