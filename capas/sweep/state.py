"""Record what a trial is doing, in a file that its worker writes and the sweep shows."""

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capas.core.files import write_whole

WAITING, RUNNING = "waiting", "running"
DONE, CACHED, FAILED = "done", "cached", "failed"
PAUSED = "paused"  # at a rung: its training goes on if it is among the best
DROPPED = "dropped"  # at a rung, because others were better there
STOPPED = "stopped"  # shown for a trial whose processes are gone before it ended
ENDED = (DONE, CACHED, FAILED, DROPPED)
AT_REST = (*ENDED, PAUSED)  # no process runs it


@dataclass
class State:
    """The state of a trial.

    Attributes:
        name: the name of the experiment.
        stage: what it runs or waits for.
        line: the last line that the stage wrote.
        reason: why it failed.
        metrics: the metrics that the sweep shows.
        step, num_steps: at a rung of successive halving, the step and the number of all steps.
        headline: the one among them that stands for the trial's result, such as tuned.rougeL.
        train_seconds: how long its training took, if it ran on this machine.
    """

    identity: str
    name: str
    overrides: list[str]
    status: str = WAITING
    stage: str = ""
    line: str = ""
    reason: str = ""
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    train_key: str = ""
    step: int = 0
    num_steps: int = 0
    metrics: dict[str, float | None] = field(default_factory=dict)
    headline: str = ""
    train_seconds: float | None = None

    @property
    def rung(self) -> str:
        return f"step {self.step} of {self.num_steps}"

    @classmethod
    def read(cls, file: Path) -> "State":
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def write(self, folder: Path, **changes: Any) -> None:
        """Write the state atomically, because the sweep may read it at any time."""
        for name, value in changes.items():
            setattr(self, name, value)
        if self.status != DROPPED:  # it had paused before
            self.seconds = round(time.time() - self.started, 1)
        write_whole(folder / f"{self.identity}.json", json.dumps(asdict(self)) + "\n")

    def remove(self, folder: Path) -> None:
        (folder / f"{self.identity}.json").unlink()


def read_states(folder: Path) -> list[State]:
    """Return the states in the order in which their trials started."""
    states = []
    for file in folder.glob("*.json"):
        with suppress(FileNotFoundError):  # the sweep removes it before it starts the trial again
            states.append(State.read(file))
    return sorted(states, key=lambda state: (state.started, state.name))
