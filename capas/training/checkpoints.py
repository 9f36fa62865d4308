"""Save checkpoints from which a resumed training gives the same bytes as an uninterrupted one."""

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
_OPEN_ROWS = "open_rows.json"  # the open row of each process
_MARK = "complete.json"  # written last into a checkpoint: the digests of its files


class Checkpoints(TrainerCallback):
    """A callback that makes a resumed training equal to an uninterrupted one, and marks complete checkpoints.

    After `stop` the current step is finished and saved, then the training ends. Old checkpoints are removed
    here: Trainer itself would remove the last complete one before the next one is marked as complete.
    """

    def __init__(self, trainer: "Trainer", total_limit: int | None = None) -> None:
        self._trainer, self._total_limit, self.terminated = trainer, total_limit, False
        self.signal = "a signal to another process"

    def stop(self, signal: str) -> None:
        """Request a checkpoint after this step, and the end of the training."""
        self.signal, self.terminated = signal, True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = _folder(args, state)
        rows = folder / _OPEN_ROWS
        if state.global_step and rows.exists():
            self._trainer.reopen_row(json.loads(rows.read_text())[args.process_index])
            self._trainer.record_scores.read(folder)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin_epoch(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide what is saved and logged after this step, and whether the training stops.

        The last step gets no checkpoint: a Trainer resumed there would take one step too many. A step at
        which the validation split is scored is also logged, so that the log has the loss of the last steps,
        too.
        """
        self.terminated = self._trainer.anywhere(self.terminated)
        control.should_save |= self.terminated
        control.should_training_stop |= self.terminated
        control.should_save &= state.global_step < state.max_steps
        control.should_log |= control.should_evaluate

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the open rows, the scores of the validation records, and the mark.

        Each process hands out its row after writing its own files, and none continues before the mark is
        written.
        """
        folder = _folder(args, state)
        rows = gather_object([self._trainer.open_row()])
        if state.is_world_process_zero:
            (folder / _OPEN_ROWS).write_text(json.dumps(rows))
            self._trainer.record_scores.write(folder)
            mark = folder / f".{_MARK}.partial"
            mark.write_text(json.dumps(_digests(folder)))
            mark.rename(folder / _MARK)
            rotate_checkpoints(args.output_dir, self._total_limit, state.best_model_checkpoint)
        self._trainer.accelerator.wait_for_everyone()


def last_checkpoint(folder: Path, resume: bool) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None; remove newer, incomplete ones.

    Without `resume` all checkpoints are removed.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found:
        newest = found.pop()
        if resume and _is_complete(newest):
            log.info("resuming from %s", newest.name)
            return newest
        log.info("%s is removed: it is incomplete, or this is a debug run", newest.name)
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
