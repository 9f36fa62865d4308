"""Extend `transformers.Trainer`: it resumes exactly, and stops if the loss diverges."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import SequentialSampler
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from capas.core.errors import CapasError, listed
from capas.core.records import IGNORE_INDEX
from capas.training.answers import AnswerMetric, mean_score
from capas.training.batches import Example, Filled, LengthGroupedSampler, make_filler
from capas.training.callbacks import Progress
from capas.training.checkpoints import Checkpoints
from capas.training.early_stopping import EarlyStopping
from capas.training.fit import num_tokens
from capas.training.record_scores import RecordScores, in_data_order
from capas.training.signals import on_signals

log = logging.getLogger("capas")
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class Trainer(transformers.Trainer):
    """A Trainer that counts its tokens, stops if the loss diverges, and draws batches so that it can resume.

    In several processes (`launch`) a step has the same records, and the same loss, as in one process.

    Args:
        save_total_limit: number of checkpoints to keep, the best one among them; older ones are removed once
            the newest is complete.
        divergence_factor: stop if the mean loss between two rows of the log exceeds this multiple of the
            first one; None stops only for a loss that is not finite.
        loraplus_lr_ratio: learning rate of LoRA's B divided by that of A; None for the same rate.
        answers: a metric of generated answers, which every evaluation computes too; None for none.
        kwargs: arguments of transformers.Trainer.
    """

    def __init__(
        self,
        save_total_limit: int | None = None,
        divergence_factor: float | None = None,
        loraplus_lr_ratio: float | None = None,
        answers: AnswerMetric | None = None,
        **kwargs: Any,
    ) -> None:
        self._answers, self._answer_seconds = answers, 0.0
        self._collate = kwargs.pop("data_collator")
        workspace = os.environ.get(_CUBLAS_WORKSPACE)
        if kwargs["args"].world_size > 1:
            kwargs["train_dataset"] = [
                *kwargs["train_dataset"],
                make_filler(kwargs["train_dataset"][0]),
            ]
        super().__init__(data_collator=self._named, **kwargs)
        if workspace is not None:  # full_determinism replaced it by a smaller one
            os.environ[_CUBLAS_WORKSPACE] = workspace
        self._divergence_factor, self._loraplus_lr_ratio = divergence_factor, loraplus_lr_ratio
        self._record_ids: list[str] = []
        self._num_tokens = 0
        self._filled: Filled | None = None
        self._eval_order: list[int] = []
        self.record_scores = RecordScores()
        self._seen = torch.zeros(2, dtype=torch.long, device=self.args.device)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._checkpoints = Checkpoints(self, save_total_limit)
        self.add_callback(self._checkpoints)
        if self.is_world_process_zero():
            self.add_callback(Progress())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; on SIGTERM (a preempted job) or Ctrl-C finish the step, save a checkpoint and stop.

        Raises:
            CapasError: a signal came before the end, the loss is not finite, or the training diverges.
            KeyboardInterrupt: Ctrl-C came a second time.
        """
        checkpoints = self._checkpoints
        started = time.monotonic()
        with on_signals(checkpoints.stop):
            result = super().train(*args, **kwargs)
        if self._answers is not None:
            fraction = self._answer_seconds / (time.monotonic() - started)
            log.info("answers took %.1f %% of the training's time", 100 * fraction)
        step, last = self.state.global_step, self.state.max_steps
        if checkpoints.terminated and step < last and not self._stopped_early():
            raise CapasError(
                f"stopped by {checkpoints.signal} at step {step} of {last}. A checkpoint was saved: "
                "the same command resumes from it"
            )
        return result

    def _stopped_early(self) -> bool:
        callbacks = self.callback_handler.callbacks
        return any(isinstance(c, EarlyStopping) and c.stopped for c in callbacks)

    def _named(self, examples: list[Example]) -> dict[str, Any]:
        """Return the batch with the ids of its records, and with its number of tokens without padding."""
        ids = [name for e in examples for name in (e["ids"] if "ids" in e else [e["id"]])]
        num_tokens = sum(len(e["input_ids"]) for e in examples if e.get("ids") != [])
        return {**self._collate(examples), "record_ids": ids, "num_tokens": num_tokens}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        self._record_ids = prepared.pop("record_ids", [])
        self._num_tokens = prepared.pop("num_tokens", 0)
        return prepared

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._seen[0] += self._num_tokens
        self._seen[1] += (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        if not torch.isfinite(loss):
            raise CapasError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, in the batch with "
                f"the records {listed(self._record_ids)}. Usual causes: a learning rate that is too "
                f"high (trainer.learning_rate={self.args.learning_rate:g}), fp16 without loss "
                "scaling, or max_grad_norm=0."
            )
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Score the validation split, keep the scores of its records, and score answers if wanted."""
        output = super().evaluation_loop(*args, **kwargs)
        scores = in_data_order(output.predictions, self._eval_order)
        self.record_scores.add(self.state.global_step, scores, self.state.best_global_step)
        if self._answers is not None:
            place, started = (self.args.process_index, self.args.world_size), time.monotonic()
            with self.accelerator.autocast():
                score = mean_score(self._answers, self.model, *place)
            self._answer_seconds += time.monotonic() - started
            output.metrics[f"eval_{self._answers.name}"] = score
            log.info(
                "step %d: %s %.4f, loss %.4f on the validation split",
                self.state.global_step, self._answers.name, score, output.metrics["eval_loss"],
            )  # fmt: skip
        return output

    def _check_divergence(self, loss: float) -> None:
        first = next((row["loss"] for row in self.state.log_history if "loss" in row), loss)
        if self._divergence_factor is not None and loss > self._divergence_factor * first:
            raise CapasError(
                f"training diverges: the loss is {loss:.4g} at step {self.state.global_step}, up "
                f"from {first:.4g} at first. Records of the last batch: {listed(self._record_ids)}. "
                f"Try a smaller trainer.learning_rate than {self.args.learning_rate:g}, more "
                "warmup_steps, or a smaller max_grad_norm; to train to the end anyway, set "
                "trainer.divergence_factor=null (training restarts)."
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer, with a separate learning rate for B if LoRA+ is on (Hayou et al. 2024)."""
        if getattr(self, "optimizer", None) is None and self._loraplus_lr_ratio is not None:
            trained = self.model if model is None else model
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = create_loraplus_optimizer(
                trained,
                optimizer_cls,
                loraplus_lr_ratio=self._loraplus_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **kwargs,
            )
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: to count them, Trainer would walk over all modules at every step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a row with the number of tokens so far; checkpoints hold the log, and so these counts.

        Raises:
            CapasError: the training diverges.
        """
        counts = ("num_tokens", "num_supervised_tokens")
        before = self.state.log_history[-1] if self.state.log_history else dict.fromkeys(counts, 0)
        everywhere = self.accelerator.reduce(self._seen, "sum")
        for name, seen in zip(counts, everywhere.tolist(), strict=True):
            logs[name] = before[name] + seen
        self._seen.zero_()
        super().log(logs, start_time)
        if "loss" in logs:
            self._check_divergence(logs["loss"])

    def _load_best_model(self) -> None:
        """Load the best checkpoint; if the last step is the best, its weights are in memory already."""
        if self.state.best_global_step != self.state.global_step:
            super()._load_best_model()

    def open_row(self) -> dict[str, Any]:
        """Return this process's part of the next row of the log: loss and tokens since the last row."""
        return {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "seen": self._seen.tolist(),
        }

    def reopen_row(self, row: dict[str, Any]) -> None:
        """Restore the open row that was saved with a checkpoint."""
        self._tr_loss.fill_(row["loss"])
        self._globalstep_last_logged = row["last_logged"]
        self._seen.copy_(torch.tensor(row["seen"]))

    def check_at_start(self, check: Callable[[], None]) -> None:
        """Call `check` when the optimizer and accelerate's state exist, before the first step."""
        self.add_callback(_AtStart(check))

    def anywhere(self, flag: bool) -> bool:
        """Return whether `flag` is True in any process; collective: all call it at the same step."""
        if self.args.world_size == 1:
            return flag
        return bool(
            self.accelerator.reduce(torch.tensor(flag, device=self.args.device).int(), "sum")
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return Trainer's order of the validation records as a list, which says whose score is whose."""
        sampler = super()._get_eval_sampler(eval_dataset)
        self._eval_order = list(range(len(eval_dataset)) if sampler is None else sampler)
        return self._eval_order

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        world_size, batch_size = self.args.world_size, self.args.train_batch_size
        if world_size == 1:
            return self._records_in_order(dataset, batch_size)
        order = self._records_in_order(dataset[:-1], batch_size * world_size)
        self._filled = Filled(order, batch_size * world_size, filler=len(dataset) - 1)
        return self._filled

    def begin_epoch(self, epoch: int) -> None:
        """Set the sampler's epoch: in several processes accelerate takes a resumed one for the first."""
        if self._filled is not None:
            self._filled.set_epoch(epoch)

    def _records_in_order(self, dataset: Any, batch_size: int) -> Any:
        """Return a sampler with the same order for any number of processes that share a batch."""
        if self.args.train_sampling_strategy == "group_by_length":
            lengths = num_tokens(dataset)
            of_step = batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(lengths, of_step, self.args.data_seed)
        if self.args.train_sampling_strategy == "sequential":
            return SequentialSampler(dataset)
        # accelerate replaces RandomSampler by this one, but not inside another sampler.
        return SeedableRandomSampler(dataset, data_seed=self.args.data_seed)


class _AtStart(TrainerCallback):
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.act()
