"""The global batch: per_device_train_batch_size is that of one process; what all make together is said."""

from typing import Any

import pytest
from shipped import composed

from capas.config.advice import advice
from capas.tracking.run_params import recorded_params
from capas.training.steps import Step


def test_the_factors_of_a_step_by_hand() -> None:
    step = Step(num_processes=2, batch_size=8, accumulation=4)
    assert step.num_rows == 64
    assert [step.num_in_epoch(n) for n in (1, 64, 65, 640)] == [1, 1, 2, 10]
    assert str(step) == "2 processes x 8 x accumulation 4 = 64 rows per step"
    assert str(Step(1, 16, 1)) == "1 process x 16 x accumulation 1 = 16 rows per step"


@pytest.mark.parametrize(
    ("batch", "accumulation", "advised"),
    [
        (8, 1, ". For the step size of one process, set trainer.per_device_train_batch_size=4"),
        (3, 4, ". For the step size of one process, set trainer.gradient_accumulation_steps=2"),
        (3, 1, ""),
    ],
)
def test_several_processes_make_larger_steps_which_compose_says(
    batch: int, accumulation: int, advised: str
) -> None:
    values = composed(
        (
            "hardware=gpu_ddp",
            f"trainer.per_device_train_batch_size={batch}",
            f"trainer.gradient_accumulation_steps={accumulation}",
        )
    )
    (line,) = advice(dict(values))
    assert line == (
        f"hardware.num_processes=2: 2 processes x {batch} x accumulation {accumulation} = "
        f"{2 * batch * accumulation} rows per step, 2 times as many as one process; an epoch has 1/2 of its "
        f"steps{advised}"
    )


def test_one_process_needs_no_advice() -> None:
    assert advice(dict(composed(("hardware=gpu",)))) == []


@pytest.mark.parametrize(("num_processes", "size"), [(1, 16), (2, 32)])
def test_mlflow_has_the_global_batch_among_the_params(num_processes: int, size: int) -> None:
    groups: dict[str, Any] = {
        "hardware": {"num_processes": num_processes},
        "trainer": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    }
    params = recorded_params({"train": {"params": {"params.yaml": groups}}})
    assert params["global_batch_size"] == str(size)
