"""Checkpoints from which a training resumes to the bytes of an undisturbed one."""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from capas.core.files import file_sha256

if TYPE_CHECKING:
    from capas.training.trainer import Trainer

log = logging.getLogger("capas")
_OPEN_ROWS = "open_rows.json"  # of each process
_MARK = "complete.json"  # written last into a checkpoint: what was saved, file by file


class Checkpoints(TrainerCallback):
    """Makes a resumed training equal to an undisturbed one, and a half-written checkpoint recognisable.

    Once `terminated` the step is finished and saved, and the training stops. Trainer itself would remove the
    last complete checkpoint while the next one is not yet marked as such.
    """

    def __init__(self, trainer: "Trainer", total_limit: int | None = None) -> None:
        self._trainer, self._total_limit, self.terminated = trainer, total_limit, False
        self.signal = "a signal to another process"

    def stop(self, signal: str) -> None:
        """Ask for a checkpoint after this step, and for the end of the training."""
        self.signal, self.terminated = signal, True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rows = _folder(args, state) / _OPEN_ROWS
        if state.global_step and rows.exists():
            self._trainer.reopen_row(json.loads(rows.read_text())[args.process_index])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin_epoch(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No checkpoint after the last step: a Trainer resumed there takes one step too many.

        Where the validation split is scored, the log has the loss up to there, too, also of the last steps.
        """
        self.terminated = self._trainer.anywhere(self.terminated)
        control.should_save |= self.terminated
        control.should_training_stop |= self.terminated
        control.should_save &= state.global_step < state.max_steps
        control.should_log |= control.should_evaluate

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Each process wrote files of its own before it hands out its row, and none ends before the mark."""
        folder = _folder(args, state)
        rows = gather_object([self._trainer.open_row()])
        if state.is_world_process_zero:
            (folder / _OPEN_ROWS).write_text(json.dumps(rows))
            mark = folder / f".{_MARK}.partial"
            mark.write_text(json.dumps(_digests(folder)))
            mark.rename(folder / _MARK)
            rotate_checkpoints(args.output_dir, self._total_limit, state.best_model_checkpoint)
        self._trainer.accelerator.wait_for_everyone()


def last_checkpoint(folder: Path, resume: bool) -> Path | None:
    """The newest complete checkpoint. Half-written ones, or all where not `resume`, are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found:
        newest = found.pop()
        if resume and _is_complete(newest):
            log.info("resuming from %s", newest.name)
            return newest
        log.info("%s is ignored: it is incomplete, or this is a debug run", newest.name)
        shutil.rmtree(newest)
    return None


def _is_complete(checkpoint: Path) -> bool:
    mark = checkpoint / _MARK
    return mark.exists() and json.loads(mark.read_text()) == _digests(checkpoint)


def _digests(checkpoint: Path) -> dict[str, str]:
    files = (path for path in sorted(checkpoint.iterdir()) if _MARK not in path.name)
    return {path.name: file_sha256(path) for path in files}


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
