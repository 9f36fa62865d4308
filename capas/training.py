"""What `transformers.Trainer` lacks: exact resumption, a loss that may not be NaN, a line of progress."""

import hashlib
import json
import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from capas.batches import LengthGroupedSampler, score_tokens
from capas.errors import CapasError
from capas.records import IGNORE_INDEX

log = logging.getLogger("capas")
_MARK = "complete.json"  # written last into a checkpoint: what was saved, file by file


class Trainer(transformers.Trainer):
    """Counts its tokens, stops at a loss that is no number, and draws batches so that it can resume."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._seen = torch.zeros(2, dtype=torch.long, device=self.args.device)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

        for added in (Checkpoints(), Progress()):
            self.add_callback(added)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self._seen[0] += inputs["attention_mask"].sum()
        self._seen[1] += (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise CapasError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}. Usual causes: a learning "
                f"rate that is too high (trainer.learning_rate={self.args.learning_rate:g}), fp16 without "
                "loss scaling, or max_grad_norm=0."
            )
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer walks over all modules for it, at every step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the tokens trained on so far: checkpoints hold the log, and with it the counts."""
        counts = ("num_tokens", "num_supervised_tokens")
        before = self.state.log_history[-1] if self.state.log_history else dict.fromkeys(counts, 0)
        for name, seen in zip(counts, self._seen.tolist(), strict=True):
            logs[name] = before[name] + seen
        self._seen.zero_()
        super().log(logs, start_time)

    def check_at_start(self, check: Callable[[], None]) -> None:
        """Run `check` when the optimizer and accelerate's state exist and no step is done yet."""
        self.add_callback(_AtStart(check))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = [len(example["input_ids"]) for example in dataset]
        return LengthGroupedSampler(lengths, batch_size, self.args.data_seed)


class _AtStart(TrainerCallback):
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.act()


class Checkpoints(TrainerCallback):
    """Makes a resumed training equal to an undisturbed one, and a half-written checkpoint recognisable."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No checkpoint between two rows of the log: the loss since the last row is not saved in it.

        And none after the last step: a Trainer resumed there takes one step too many.
        """
        control.should_log |= control.should_save
        control.should_save &= state.global_step < state.max_steps

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            mark = folder / f".{_MARK}.partial"
            mark.write_text(json.dumps(_digests(folder)))
            mark.rename(folder / _MARK)


def last_checkpoint(folder: Path, resume: bool) -> Path | None:
    """The newest complete checkpoint. Half-written ones, or all where not `resume`, are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found:
        newest = found.pop()
        if resume and _is_complete(newest):
            log.info("going on from %s", newest.name)
            return newest
        log.info(
            "%s is not used: it was not written to its end, or this is a debug run", newest.name
        )
        shutil.rmtree(newest)
    return None


def _is_complete(checkpoint: Path) -> bool:
    mark = checkpoint / _MARK
    return mark.exists() and json.loads(mark.read_text()) == _digests(checkpoint)


def _digests(checkpoint: Path) -> dict[str, str]:
    files = (path for path in sorted(checkpoint.iterdir()) if _MARK not in path.name)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class LiveRows(TrainerCallback):
    """Hands every row of the log on, e.g. to `capas.live`."""

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
        scored = [row for row in state.log_history if "eval_loss" in row and row["step"] > 0]
        shown = f", validation {scored[-1]['eval_loss']:.4f}" if scored else ""
        return (
            f"loss {_last(state, 'loss', math.nan):.4f}{shown}, {tokens:.0f} tokens/s, "
            f"{int(remaining // 60)}:{int(remaining % 60):02d} left"
        )


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
