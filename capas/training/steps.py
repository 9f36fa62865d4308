"""Compute the number of rows in a step of the optimizer: all processes, all accumulated batches.

As in `transformers.Trainer`, per_device_train_batch_size is that of one process: more processes make larger
steps, and fewer of them in an epoch. A row is a record, or several packed ones (trainer.packing_length).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """The three factors of the global batch size."""

    num_processes: int
    batch_size: int
    accumulation: int

    @classmethod
    def of(cls, trainer: Any, hardware: Any) -> "Step":
        """Return the step that the groups `trainer` and `hardware` describe."""
        return cls(
            hardware["num_processes"],
            trainer["per_device_train_batch_size"],
            trainer["gradient_accumulation_steps"],
        )

    @property
    def num_rows(self) -> int:
        return self.num_processes * self.batch_size * self.accumulation

    def num_in_epoch(self, num_rows: int) -> int:
        """Return the number of steps in an epoch; the last one may have fewer rows."""
        return -(-num_rows // self.num_rows)

    def __str__(self) -> str:
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        factors = f"{processes} x {self.batch_size} x accumulation {self.accumulation}"
        return f"{factors} = {self.num_rows} rows per step"


def advice(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line if several processes make steps larger than the trainer group alone suggests."""
    step = Step.of(values["trainer"], values["hardware"])
    n = step.num_processes
    if n == 1:
        return
    line = (
        f"hardware.num_processes={n}: {step}, {n} times as many as one process; "
        f"an epoch has 1/{n} of its steps"
    )
    for key, value in (
        ("gradient_accumulation_steps", step.accumulation),
        ("per_device_train_batch_size", step.batch_size),
    ):
        if value % n == 0:
            yield f"{line}. For the step size of one process, set trainer.{key}={value // n}"
            return
    yield line
