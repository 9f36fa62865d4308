"""Stop a training whose score on the validation split no longer improves."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger("capas")


class EarlyStopping(TrainerCallback):
    """A callback that stops the training after `patience` evaluations in a row without a better score.

    It depends on the log alone. `transformers.EarlyStoppingCallback` counts in an attribute of its own, which
    a resumed training does not have. The step at which it stops has no checkpoint, like the last step: a
    Trainer resumed there would continue.
    """

    def __init__(self, metric: str, patience: int, threshold: float) -> None:
        self.metric, self.patience, self.threshold = metric, patience, threshold
        self.stopped = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scores = [row[f"eval_{self.metric}"] for row in evaluations(state.log_history)]
        if waited(scores, bool(args.greater_is_better), self.threshold) >= self.patience:
            log.info(
                "stopped early: %s did not improve in %d evaluations", self.metric, self.patience
            )
            control.should_training_stop = self.stopped = True
            control.should_save = False


def waited(scores: list[float], greater_is_better: bool, threshold: float = 0.0) -> int:
    """Return the number of scores after the last that exceeded all before it by more than `threshold`."""
    best, since = None, 0
    for score in scores:
        gain = 0.0 if best is None else (score - best if greater_is_better else best - score)
        if best is None or gain > threshold:
            best, since = score, 0
        else:
            since += 1
    return since


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the log for the validation split, without that of the base."""
    return [row for row in history if "eval_loss" in row and row["step"] > 0]
