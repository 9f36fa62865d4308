"""Check the arguments of each learning rate schedule: trainer.lr_scheduler_kwargs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Argument:
    """An argument of a learning rate schedule: a check of its value, and the text of what is expected."""

    holds: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_STEPS = Argument(lambda v: type(v) is int and v >= 0, "a whole number of steps, at least 0")
_SOME_STEPS = Argument(lambda v: type(v) is int and v >= 1, "a whole number of steps, at least 1")
_CYCLES = Argument(lambda v: type(v) is int and v >= 1, "a whole number of restarts, at least 1")
_WAVES = Argument(
    lambda v: _is_number(v) and v > 0, "a number above 0; 0.5 falls once and stays down"
)
_POWER = Argument(lambda v: _is_number(v) and v > 0, "a number above 0")
_RATE = Argument(
    lambda v: _is_number(v) and v >= 0, "a learning rate of at least 0, below trainer.learning_rate"
)
_RATIO = Argument(
    lambda v: _is_number(v) and 0 <= v < 1,
    "a fraction of trainer.learning_rate, at least 0 and below 1",
)
_RAMP = Argument(lambda v: v in ("linear", "cosine", "1-sqrt"), "linear, cosine or 1-sqrt")
# The arguments of each schedule in transformers.optimization, without those that Trainer sets.
SCHEDULES: dict[str, dict[str, Argument]] = {
    "linear": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine": {"num_cycles": _WAVES},
    "cosine_with_restarts": {"num_cycles": _CYCLES},
    "cosine_with_min_lr": {"num_cycles": _WAVES, "min_lr": _RATE, "min_lr_rate": _RATIO},
    "polynomial": {"lr_end": _RATE, "power": _POWER},
    "inverse_sqrt": {"timescale": _SOME_STEPS},
    "warmup_stable_decay": {
        "num_decay_steps": _SOME_STEPS,
        "num_stable_steps": _STEPS,
        "warmup_type": _RAMP,
        "decay_type": _RAMP,
        "min_lr_ratio": _RATIO,
        "num_cycles": _WAVES,
    },
}


def schedule_problems(kind: str, kwargs: dict[str, Any], learning_rate: float) -> Iterator[str]:
    """Yield a sentence for each argument in trainer.lr_scheduler_kwargs that the schedule cannot take."""
    for name, value in kwargs.items():
        key, argument = f"trainer.lr_scheduler_kwargs.{name}", SCHEDULES[kind].get(name)
        if argument is None:
            yield (
                f"{key}={show(value)}: lr_scheduler_type={kind} has no such argument; expected keys of that "
                f"schedule: {', '.join(SCHEDULES[kind]) or 'none'} (~{key} on the command line removes it)"
            )
        elif not argument.holds(value) or (argument is _RATE and value >= learning_rate):
            yield f"{key}={show(value)}: expected {argument.expected} ({kind})"


def show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
