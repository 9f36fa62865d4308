"""How many answers a training generates: by counted work, within a tenth of it."""

from typing import Any

import pytest
from shipped import composed

from capas.core.params import Params
from capas.evaluation.answer_budget import (
    BUDGET_FRACTION,
    MIN_RECORDS,
    Answers,
    choose_number,
    fraction_of,
    num_steps,
    work_between,
)

ANSWERS = Answers(prompt_length=70.0, limit=68, batch_size=50, device="cpu")


def groups(*overrides: str) -> tuple[Any, Any]:
    params = Params(composed(list(overrides)))
    return params.trainer, params.hardware


def test_the_work_of_answers_is_that_of_prompts_and_of_passes() -> None:
    """Two batches: 2 x 68 passes of 128, and 68 x 4 and 70 for each of 60 records."""
    assert ANSWERS.work(60) == 2 * 68 * 128 + 60 * (68 * 4 + 70)
    assert ANSWERS.work(0) == 0
    assert Answers(70.0, 68, 50, "cuda").work(60) > 4 * ANSWERS.work(60)


@pytest.mark.parametrize("num_records", [1, 17, 49, 50, 51, 99, 100, 150])
def test_the_affordable_number_is_the_largest_within_the_budget(num_records: int) -> None:
    assert ANSWERS.affordable(ANSWERS.work(num_records)) == num_records
    assert ANSWERS.affordable(ANSWERS.work(num_records) - 1) == num_records - 1
    assert ANSWERS.affordable(0) == 0


def test_the_work_of_a_training_counts_tokens_not_seconds() -> None:
    """100 rows of 30 tokens in steps of 16: 7 an epoch, 14 in all; evaluated before, at 10 and at last."""
    trainer, hardware = groups("trainer.eval_steps=10")
    lengths = [20, 40] * 50
    assert num_steps(100, trainer, hardware) == 14
    assert work_between(lengths, trainer, hardware, False) == 14 * 16 * 30 * 2.5 / 3
    assert work_between(lengths, trainer, hardware, True) == 14 * 16 * 30 * 3 / 3
    trainer, hardware = groups("trainer.max_steps=20", "trainer.gradient_checkpointing=true")
    assert work_between(lengths, trainer, hardware, False) == 20 * 16 * 30 * 3.5 / 2


def test_processes_share_the_records_and_the_steps() -> None:
    trainer, hardware = groups("hardware.num_processes=2")
    assert num_steps(100, trainer, hardware) == 8
    work = ANSWERS.work(40) / BUDGET_FRACTION
    assert choose_number(ANSWERS, work, 200, 1) == 40
    assert choose_number(ANSWERS, work, 200, 2) == 80
    assert fraction_of(ANSWERS, 80, work, 2) == pytest.approx(BUDGET_FRACTION)


def test_there_are_never_more_than_the_split_has_nor_too_few_to_say_anything() -> None:
    assert choose_number(ANSWERS, 1e9, 200, 1) == 200
    assert choose_number(ANSWERS, 0.0, 200, 1) == MIN_RECORDS
    assert choose_number(ANSWERS, 0.0, 5, 1) == 5


def test_the_default_training_is_within_the_budget_at_every_evaluation() -> None:
    """The sizes of the embedded records: 750 steps; every 150 and every 50 of them."""
    lengths = [101] * 6000
    for eval_steps, expected in ((150, 96), (50, 29)):
        trainer, hardware = groups(f"trainer.eval_steps={eval_steps}")
        work = work_between(lengths, trainer, hardware, False)
        number = choose_number(ANSWERS, work, 200, 1)
        assert number == expected
        assert fraction_of(ANSWERS, number, work, 1) <= BUDGET_FRACTION
