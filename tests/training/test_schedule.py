"""All learning rates of a training are looked at before its first step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.optimization import get_scheduler

from capas.core.errors import CapasError
from capas.training.schedule import check_rates

PEAK = 4e-3


def check(kind: str, num_steps: int, warmup: int, factor: Any = None, **kwargs: Any) -> list[str]:
    """What is said of a schedule as transformers makes it, or of one that gives `factor`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    made = get_scheduler(kind, optimizer, warmup, num_steps, scheduler_specific_kwargs=kwargs)
    args = SimpleNamespace(learning_rate=PEAK, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs)
    return check_rates(factor or made.lr_lambdas[0], num_steps, warmup, args)


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("polynomial", {}),
        ("constant_with_warmup", {}),
        ("warmup_stable_decay", {"num_decay_steps": 20}),
        ("cosine_with_min_lr", {"min_lr": PEAK / 10}),
    ],
)
def test_of_a_usual_schedule_nothing_is_said(kind: str, kwargs: dict[str, Any]) -> None:
    assert check(kind, 100, 5, **kwargs) == []


@pytest.mark.parametrize(
    ("kind", "num_steps", "warmup", "kwargs", "said"),
    [
        ("linear", 4, 10, {}, "peaks at 0.0012"),
        (
            "warmup_stable_decay",
            4,
            1,
            {"num_decay_steps": 100},
            "and never reaches trainer.learning_rate",
        ),
        ("cosine", 100, 0, {"num_cycles": 1}, "does not decay; in the last step it is 0.004"),
        ("inverse_sqrt", 100, 0, {}, "does not decay"),
    ],
)
def test_a_schedule_that_is_hardly_meant_is_said(
    kind: str, num_steps: int, warmup: int, kwargs: dict[str, Any], said: str
) -> None:
    assert said in " ".join(check(kind, num_steps, warmup, **kwargs))


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize(
    ("kind", "num_steps", "warmup", "kwargs", "refusal"),
    [
        ("linear", 1, 1, {}, "is 0 for 1 of 1 steps.* Set trainer.warmup_steps=0"),
        ("polynomial", 4, 4, {}, "the warm-up takes all steps"),
        (
            "warmup_stable_decay",
            *(100, 5, {"num_decay_steps": 10, "num_stable_steps": 10}),
            "is 0 for 76 of 100 steps",
        ),
    ],
)
def test_a_schedule_that_learns_nothing_is_refused(
    kind: str, num_steps: int, warmup: int, kwargs: dict[str, Any], refusal: str
) -> None:
    with pytest.raises(CapasError, match=refusal):
        check(kind, num_steps, warmup, **kwargs)


@pytest.mark.parametrize(("outlier", "rate"), [(-0.5, "-0.002"), (2.0, "0.008")])
def test_a_rate_below_zero_or_above_the_peak_is_refused(outlier: float, rate: str) -> None:
    with pytest.raises(CapasError, match=f"the learning rate of step 3 is {rate}; it must stay"):
        check("linear", 4, 0, factor=lambda step: outlier if step == 2 else 1 - step / 4)
