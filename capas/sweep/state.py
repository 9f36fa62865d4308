"""What a point is doing, in a file that its worker writes and that the sweep shows."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capas.core.files import write_whole

WAITING, RUNNING = "waiting", "running"
DONE, CACHED, FAILED = "done", "cached", "failed"
ENDED = (DONE, CACHED, FAILED)


@dataclass
class State:
    """`stage` is what it runs or waits for, `reason` why it failed, `metrics` those that the sweep shows."""

    identity: str
    name: str  # of the experiment
    overrides: list[str]
    status: str = WAITING
    stage: str = ""
    line: str = ""  # the last that the stage said
    reason: str = ""
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    train_key: str = ""
    metrics: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "State":
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def write(self, folder: Path, **changes: Any) -> None:
        """Whole or not at all: the sweep reads it at any time."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.seconds = round(time.time() - self.started, 1)
        write_whole(folder / f"{self.identity}.json", json.dumps(asdict(self)) + "\n")


def read_states(folder: Path) -> list[State]:
    """In the order in which they were started."""
    files = sorted(folder.glob("*.json"))
    return sorted(map(State.read, files), key=lambda state: (state.started, state.name))
