"""Check the learning rates of a whole training before its first step."""

import logging
from collections.abc import Callable
from typing import Any

from capas.core.errors import CapasError

log = logging.getLogger("capas")
CONSTANT = ("constant", "constant_with_warmup")
_ROUNDING = 1e-6
_HARDLY_LOWER = 0.99  # as a fraction of the peak: a last rate above it is no decay


def check_schedule(trainer: Any) -> None:
    """Check all rates of a `transformers.Trainer` whose scheduler exists, and log a warning for unusual ones.

    Raises:
        CapasError: see `check_rates`.
    """
    # accelerate wraps the scheduler
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    args, num_steps = trainer.args, trainer.state.max_steps
    warmup = args.get_warmup_steps(num_steps)
    for line in check_rates(scheduler.lr_lambdas[0], num_steps, warmup, args):
        log.warning("%s", line)


def check_rates(
    factor: Callable[[int], float], num_steps: int, num_warmup: int, args: Any
) -> list[str]:
    """Check every learning rate of a training.

    Args:
        factor: returns the rate of a step, counted from 0, as a fraction of learning_rate.
        args: TrainingArguments; learning_rate, lr_scheduler_type and lr_scheduler_kwargs matter.

    Returns:
        A sentence for each property that is allowed but rarely meant.

    Raises:
        CapasError: the rate is 0 for most of the steps, cannot decay after the warm-up, is negative or is
            above the peak.
    """
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    given = f"trainer.lr_scheduler_type={kind}"
    if args.lr_scheduler_kwargs:
        given += f", trainer.lr_scheduler_kwargs={dict(args.lr_scheduler_kwargs)}"
    about = f"{given}, {num_warmup} warm-up steps of {num_steps} (trainer.warmup_steps)"
    try:
        rates = [factor(step) for step in range(num_steps + 1)][:-1]  # Trainer computes one more
    except ArithmeticError:
        raise CapasError(
            f"{about}: the warm-up takes all steps, so the learning rate cannot decay. Set a "
            "smaller trainer.warmup_steps"
        ) from None
    peak, zeros = max(rates), sum(rate == 0 for rate in rates)
    if wrong := [rate for rate in rates if not -_ROUNDING <= rate <= 1 + _ROUNDING]:
        step, rate = rates.index(wrong[0]) + 1, wrong[0] * args.learning_rate
        raise CapasError(
            f"{about}: the learning rate of step {step} is {rate:.3g}; it must stay between 0 and "
            f"trainer.learning_rate={args.learning_rate:g}"
        )
    if peak == 0 or 2 * zeros > num_steps:
        raise CapasError(
            f"{about}: the learning rate is 0 for {zeros} of {num_steps} steps. "
            + (
                "Set trainer.warmup_steps=0, or train for more steps"
                if peak == 0
                else "Let the schedule last as long as the training"
            )
        )
    if peak < 1 - _ROUNDING:
        return [
            f"{about}: the learning rate peaks at {peak * args.learning_rate:.3g} and never reaches "
            f"trainer.learning_rate={args.learning_rate:g}"
        ]
    if kind not in CONSTANT and num_steps > 1 and rates[-1] > _HARDLY_LOWER * peak:
        return [
            f"{about}: the learning rate does not decay; in the last step it is "
            f"{rates[-1] * args.learning_rate:.3g}"
        ]
    return []
