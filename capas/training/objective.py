"""Define what a training minimises: how records become batches and outputs are scored; the curve's columns.

`AnswerTokens` is the only one so far. One for preferences would read pairs of answers and score margins.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from transformers import EvalPrediction

from capas.core.errors import CapasError
from capas.training.batches import Collator, Example, read_examples, score_tokens


class Objective(Protocol):
    """The seam between the training loop and what it minimises."""

    curve: ClassVar[tuple[str, ...]]  # what `summarize` returns; the first is the loss
    loss: (
        Callable[..., torch.Tensor] | None
    )  # Trainer's compute_loss_func; None: the model's own loss

    def read(self, file: Path) -> list[Example]:
        """Return the examples of a file of data/formatted."""
        ...

    def collator(self, chat: dict[str, Any], flatten: bool) -> Collator:
        """Return what makes a batch of examples.

        Args:
            chat: chat.json of data/formatted.
            flatten: join packed rows into a single one, as flash attention expects.
        """
        ...

    def score(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return a few numbers per record instead of its logits: [batch, numbers]."""
        ...

    def summarize(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the values of `curve` from the numbers of all validation records."""
        ...


class AnswerTokens:
    """The cross entropy of the tokens with a label: those of the answers, end tokens included."""

    curve: ClassVar[tuple[str, ...]] = ("loss", "token_accuracy")
    loss: Callable[..., torch.Tensor] | None = None

    def read(self, file: Path) -> list[Example]:
        return read_examples(file)

    def collator(self, chat: dict[str, Any], flatten: bool) -> Collator:
        return Collator(chat["pad_token_id"], flatten)

    def score(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return `score_tokens` of each record, [batch, 3]."""
        return score_tokens(logits[0] if isinstance(logits, tuple) else logits, labels)

    def summarize(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the means over all supervised tokens.

        They replace Trainer's own eval_loss, a mean over batches, in which short answers count as much as
        long ones.

        Raises:
            CapasError: the loss is not finite.
        """
        loss, hits, count = prediction.predictions.sum(axis=0)
        if not math.isfinite(loss):
            raise CapasError(
                f"the validation loss is {loss}: the training diverged. Try a smaller trainer.learning_rate"
            )
        return {"loss": float(loss / count), "token_accuracy": float(hits / count)}
