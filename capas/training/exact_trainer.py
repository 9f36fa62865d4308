"""What `transformers.Trainer` lacks: exact resumption, a loss that may not run away, a line of progress."""

import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import broadcast_object_list, gather_object
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import SequentialSampler
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from capas.core.errors import CapasError
from capas.core.records import IGNORE_INDEX
from capas.models.tuned_weights import file_sha256
from capas.training.batches import Example, Filled, LengthGroupedSampler, make_filler, score_tokens

log = logging.getLogger("capas")
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_OPEN_ROWS = "open_rows.json"  # of each process
_SAVING = b"train: saving a checkpoint after this step; Ctrl-C again stops at once, without it\n"
_MARK = "complete.json"  # written last into a checkpoint: what was saved, file by file


class Trainer(transformers.Trainer):
    """Counts its tokens, stops at a loss that runs away, and draws batches so that it can resume.

    In several processes (`launch`) a step has the records, and the loss, that it would have in one.

    Args:
        save_total_limit: checkpoints that are kept, the best one among them; older ones go once the newest is
            complete.
        divergence_factor: a mean loss between two rows of the log that is larger than so many times the first
            one stops the training; None: only a loss that is no number does.
        loraplus_lr_ratio: learning rate of LoRA's B over that of A; None: the same.
        kwargs: of transformers.Trainer.
    """

    def __init__(
        self,
        save_total_limit: int | None = None,
        divergence_factor: float | None = None,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._collate = kwargs.pop("data_collator")
        workspace = os.environ.get(_CUBLAS_WORKSPACE)
        if kwargs["args"].world_size > 1:
            kwargs["train_dataset"] = [
                *kwargs["train_dataset"],
                make_filler(kwargs["train_dataset"][0]),
            ]
        super().__init__(data_collator=self._named, **kwargs)
        if workspace is not None:  # full_determinism sets the smaller of the two that repeat
            os.environ[_CUBLAS_WORKSPACE] = workspace
        self._divergence_factor, self._loraplus_lr_ratio = divergence_factor, loraplus_lr_ratio
        self._record_ids: list[str] = []
        self._num_tokens = 0
        self._filled: Filled | None = None
        self._seen = torch.zeros(2, dtype=torch.long, device=self.args.device)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._checkpoints = Checkpoints(self, save_total_limit)
        self.add_callback(self._checkpoints)
        if self.is_world_process_zero():
            self.add_callback(Progress())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Finish the step and save a checkpoint on SIGTERM (a preempted job) and on Ctrl-C.

        Raises:
            CapasError: the signal came before the end.
            KeyboardInterrupt: Ctrl-C came a second time.
        """
        checkpoints = self._checkpoints
        with _on_signals(checkpoints.stop):
            result = super().train(*args, **kwargs)
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
        """The batch with its records' ids, and its number of tokens without padding."""
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
        """With a learning rate of its own for B, as LoRA+ has it (Hayou et al. 2024)."""
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
        """Not counted: Trainer walks over all modules for it, at every step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the tokens trained on so far: checkpoints hold the log, and with it the counts.

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
        """The last step has no checkpoint: where it is the best one, its weights are in memory."""
        if self.state.best_global_step != self.state.global_step:
            super()._load_best_model()

    def open_row(self) -> dict[str, Any]:
        """What the next row of the log will be made of here: the loss and the tokens since the last one."""
        return {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "seen": self._seen.tolist(),
        }

    def reopen_row(self, row: dict[str, Any]) -> None:
        """As it was when a checkpoint was written."""
        self._tr_loss.fill_(row["loss"])
        self._globalstep_last_logged = row["last_logged"]
        self._seen.copy_(torch.tensor(row["seen"]))

    def check_at_start(self, check: Callable[[], None]) -> None:
        """Run `check` when the optimizer and accelerate's state exist and no step is done yet."""
        self.add_callback(_AtStart(check))

    def anywhere(self, told: bool) -> bool:
        """Whether `told` is true in any of the processes, which all ask this at the same step."""
        if self.args.world_size == 1:
            return told
        return bool(
            self.accelerator.reduce(torch.tensor(told, device=self.args.device).int(), "sum")
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        world_size, batch_size = self.args.world_size, self.args.train_batch_size
        if world_size == 1:
            return self._records_in_order(dataset, batch_size)
        order = self._records_in_order(dataset[:-1], batch_size * world_size)
        self._filled = Filled(order, batch_size * world_size, filler=len(dataset) - 1)
        return self._filled

    def begin_epoch(self, epoch: int) -> None:
        """accelerate tells an epoch that is resumed in several processes that it is the first one."""
        if self._filled is not None:
            self._filled.set_epoch(epoch)

    def _records_in_order(self, dataset: Any, batch_size: int) -> Any:
        """Of an epoch, whatever the number of processes that share a batch."""
        if self.args.train_sampling_strategy == "group_by_length":
            lengths = [len(example["input_ids"]) for example in dataset]
            of_step = batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(lengths, of_step, self.args.data_seed)
        if self.args.train_sampling_strategy == "sequential":
            return SequentialSampler(dataset)
        # What accelerate makes of RandomSampler, but where another sampler contains that.
        return SeedableRandomSampler(dataset, data_seed=self.args.data_seed)


class _AtStart(TrainerCallback):
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.act()


class Checkpoints(TrainerCallback):
    """Makes a resumed training equal to an undisturbed one, and a half-written checkpoint recognisable.

    Once `terminated` the step is finished and saved, and the training stops. Trainer itself would remove the
    last complete checkpoint while the next one is not yet marked as such.
    """

    def __init__(self, trainer: Trainer, total_limit: int | None = None) -> None:
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


class EarlyStopping(TrainerCallback):
    """Stops where so many evaluations in a row brought no better score.

    It is a function of the log alone. `transformers.EarlyStoppingCallback` counts in an attribute of its own,
    which a resumed training does not have. The step where it stops has no checkpoint, as the last one has
    none: a Trainer resumed there would go on.
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
    """How many scores came after the last that was better, by more than `threshold`, than all before."""
    best, since = None, 0
    for score in scores:
        gain = 0.0 if best is None else (score - best if greater_is_better else best - score)
        if best is None or gain > threshold:
            best, since = score, 0
        else:
            since += 1
    return since


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the validation split, less that of the base."""
    return [row for row in history if "eval_loss" in row and row["step"] > 0]


@contextmanager
def _on_signals(act: Callable[[str], None]) -> Iterator[None]:
    """Call act(name) inside the block on SIGTERM, and on the first Ctrl-C; the second one interrupts.

    Only the main thread may set handlers. Where SIGINT is ignored (`nohup`, a shell's background job) it
    stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        act("Ctrl-C")
        os.write(2, _SAVING)  # a log record could wait for the lock of the one that was interrupted

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: act("SIGTERM"))}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def listed(names: list[str], most: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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


class LiveRows(TrainerCallback):
    """Hands every row of the log on, e.g. to `capas.training.live_rows`."""

    def __init__(self, append: Callable[[dict[str, Any]], None]) -> None:
        self.append = append

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._logged, self._step, self._tokens = (
            time.monotonic(),
            state.global_step,
            _last(state, "num_tokens", 0),
        )
        for row in state.log_history:  # of the run that this one resumes
            self.append(row)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now, (step, tokens) = time.monotonic(), (state.global_step, _last(state, "num_tokens", 0))
        speed = (
            {"tokens_per_second": (tokens - self._tokens) / (now - self._logged)}
            if step > self._step
            else {}
        )
        self._logged, self._step, self._tokens = now, step, tokens
        self.append({**state.log_history[-1], **speed, "memory_bytes": _peak_memory()})


class Progress(TrainerCallback):
    """A bar in a terminal; elsewhere a line every few seconds."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = self._shown = time.monotonic()
        self._first_step, self._first_tokens = state.global_step, _last(state, "num_tokens", 0)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self._first_step:
            return  # the base's validation loss: nothing was trained yet
        now = time.monotonic()
        facts = self._facts(state, max(now - self._started, 1e-9))
        if self._bar is not None:
            self._bar.set_postfix_str(facts)
        elif now - self._shown >= self.seconds:
            self._shown = now
            log.info("step %d/%d, %s", state.global_step, state.max_steps, facts)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif state.global_step > self._first_step:
            elapsed = max(time.monotonic() - self._started, 1e-9)
            log.info("%d steps done, %s", state.global_step, self._facts(state, elapsed))

    def _facts(self, state: TrainerState, elapsed: float) -> str:
        steps = state.global_step - self._first_step
        tokens = (_last(state, "num_tokens", 0) - self._first_tokens) / elapsed
        remaining = (state.max_steps - state.global_step) * elapsed / steps
        scored = evaluations(state.log_history)
        shown = f", validation {scored[-1]['eval_loss']:.4f}" if scored else ""
        return (
            f"loss {_last(state, 'loss', math.nan):.4f}{shown}, {tokens:.0f} tokens/s, "
            f"{int(remaining // 60)}:{int(remaining % 60):02d} left"
        )


def told_by_main(value: Any) -> Any:
    """What the first process has, when that has come so far; all must ask."""
    return broadcast_object_list([value])[0]


def score_batch(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics`: three numbers a record instead of its logits."""
    return score_tokens(logits[0] if isinstance(logits, tuple) else logits, labels)


def summarize(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics`: the mean over all supervised tokens.

    It replaces Trainer's own eval_loss, a mean over batches, where short answers count as much as long ones.

    Raises:
        CapasError: the loss is no number.
    """
    loss, hits, count = prediction.predictions.sum(axis=0)
    if not math.isfinite(loss):
        raise CapasError(
            f"the validation loss is {loss}: the training diverged. Try a smaller trainer.learning_rate"
        )
    return {"loss": float(loss / count), "token_accuracy": float(hits / count)}


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kib = 1024 if sys.platform != "darwin" else 1  # ru_maxrss is KiB on Linux and bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def _last(state: TrainerState, name: str, default: float) -> float:
    return next((row[name] for row in reversed(state.log_history) if name in row), default)
