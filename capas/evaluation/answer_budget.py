"""Decide how many answers a training generates at each evaluation: at most a tenth of its work. Pure.

The work is counted, so that every machine generates for the same records; a clock would not. Its unit is
the forward pass of one token of a batch:

    a training token        2.5 with LoRA, 3 if all weights are trained; one more with gradient checkpointing
    a token of a prompt     1
    a pass for one token    128 on a CPU, 1024 on a GPU, and 4 for each answer of the batch

Measured on the embedded model, two cores: a training token takes 2.4 to 2.9, a pass 115 and 3.8 for each
answer. The pass on a GPU is an estimate: reading all weights takes as long as the products of many tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capas.training.steps import Step

BUDGET_FRACTION = 0.1
MIN_RECORDS = 16  # fewer say too little, even if they take more than the budget
_PASS = {"cpu": 128, "cuda": 1024}
_PASS_OF_ANSWER = 4
_LORA, _ALL, _CHECKPOINTING = 2.5, 3.0, 1.0


@dataclass(frozen=True)
class Answers:
    """The answers of an evaluation.

    Attributes:
        prompt_length: mean tokens of a prompt.
        limit: most tokens of an answer.
        batch_size: answers that are generated at once.
    """

    prompt_length: float
    limit: int
    batch_size: int
    device: str

    def work(self, num_records: int) -> float:
        """Return the work of one process that answers the prompts of these records."""
        batches = math.ceil(num_records / self.batch_size)
        passes = self.limit * (batches * _PASS[self.device] + num_records * _PASS_OF_ANSWER)
        return passes + num_records * self.prompt_length

    def affordable(self, budget: float) -> int:
        """Return the largest number of records whose work is within `budget`."""
        full = int(budget // self.work(self.batch_size)) * self.batch_size
        left = budget - self.work(full) - self.limit * _PASS[self.device]
        return full + max(0, int(left // (self.limit * _PASS_OF_ANSWER + self.prompt_length)))


def work_between(lengths: Sequence[float], trainer: Any, hardware: Any, trains_all: bool) -> float:
    """Return the work of one process of the training, divided by its number of evaluations.

    Args:
        lengths: number of tokens in each row that batches are made of.
        trainer, hardware: params groups.
        trains_all: whether all weights are trained.
    """
    steps = num_steps(len(lengths), trainer, hardware)
    rows = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    num_evaluations = 1 + math.ceil(steps / trainer.eval_steps)  # the first one is of the base
    of_token = (_ALL if trains_all else _LORA) + _CHECKPOINTING * trainer.gradient_checkpointing
    return steps * rows * sum(lengths) / len(lengths) * of_token / num_evaluations


def num_steps(num_rows: int, trainer: Any, hardware: Any) -> int:
    """Return the number of steps of the training, if it does not stop early."""
    if trainer.max_steps > 0:
        return int(trainer.max_steps)
    return math.ceil(Step.of(trainer, hardware).num_in_epoch(num_rows) * trainer.num_train_epochs)


def choose_number(answers: Answers, work: float, num_there: int, num_processes: int) -> int:
    """Return for how many of the validation records answers are generated.

    Args:
        work: of one process between two evaluations.
        num_there: records of the validation split; the processes share those that are chosen.
    """
    affordable = answers.affordable(BUDGET_FRACTION * work) * num_processes
    return min(num_there, max(MIN_RECORDS, affordable))


def fraction_of(answers: Answers, num_records: int, work: float, num_processes: int) -> float:
    """Return the work of the answers as a fraction of the training's."""
    return answers.work(math.ceil(num_records / num_processes)) / work
