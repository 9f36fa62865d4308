"""Pause a training where the environment asks for it: see `capas.training.pause`."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from capas.core.errors import Paused
from capas.core.files import write_json
from capas.training.pause import VARIABLE, score_file, step_of

if TYPE_CHECKING:
    from capas.training.trainer import Trainer


class Pause(TrainerCallback):
    """A callback that scores the validation split at the pause, outside of the log, and ends the training.

    It must be added after `Checkpoints`, so that the checkpoint is complete before it is scored. A training
    that resumes from a later checkpoint, which another command has saved, pauses there at once.

    Args:
        folder: the folder of the checkpoints, which gets the scores.
        curve: names of the scores (`Objective.curve`).

    Raises:
        Paused: in `Trainer.train`, at the pause.
    """

    def __init__(
        self, trainer: "Trainer", fraction: Fraction, folder: Path, curve: Sequence[str]
    ) -> None:
        self._trainer, self._fraction, self._folder = trainer, fraction, folder
        self._curve = curve

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step and self._is_due(state):
            self._pause(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save |= self._is_due(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_due(state):
            self._pause(state)

    def _is_due(self, state: TrainerState) -> bool:
        return step_of(self._fraction, state.max_steps) <= state.global_step < state.max_steps

    def _pause(self, state: TrainerState) -> None:
        file = self._folder / score_file(self._fraction)
        if state.global_step == step_of(self._fraction, state.max_steps) or not file.exists():
            scores = self._scores(state)
            if state.is_world_process_zero:
                steps = {"step": state.global_step, "num_steps": state.max_steps}
                write_json(file, {**steps, **scores})
        raise Paused(
            f"paused at step {state.global_step} of {state.max_steps}, because {VARIABLE}={self._fraction}. "
            "A checkpoint was saved: the same command without this variable goes on from it"
        )

    def _scores(self, state: TrainerState) -> dict[str, float]:
        """Return the scores of this step; the log has them if its evaluation was due anyway."""
        last = state.log_history[-1] if state.log_history else {}
        if last.get("step") != state.global_step or f"eval_{self._curve[0]}" not in last:
            loader = self._trainer.get_eval_dataloader()
            last = self._trainer.evaluation_loop(loader, "Validation").metrics or {}
        return {f"validation_{name}": last[f"eval_{name}"] for name in self._curve}
