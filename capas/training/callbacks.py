"""Show a training while it runs: its log rows for a tracker, and its progress for the user."""

import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from capas.core.peak_memory import peak_memory_bytes
from capas.training.early_stopping import evaluations

log = logging.getLogger("capas")


class LiveRows(TrainerCallback):
    """A callback that passes every row of the log on, e.g. to `capas.training.live_rows`."""

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
        for row in state.log_history:  # rows of the training that this one resumes
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
    """A callback that shows a bar in a terminal, and elsewhere logs a line every few seconds."""

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
            return  # this is the base's validation loss: nothing is trained yet
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


def _last(state: TrainerState, name: str, default: float) -> float:
    return next((row[name] for row in reversed(state.log_history) if name in row), default)


def _peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory_bytes()
