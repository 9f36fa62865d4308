"""Compare eager attention, which writes out the matrix of weights, with sdpa, PyTorch's fused kernels.

Both compute the same function but round differently.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from capas.core.errors import CapasError
from capas.models.coverage import unwrapped

IMPLEMENTATIONS = ("eager", "sdpa")
# The memory of eager attention grows with the square of the tokens.
MAX_SEQUENCES, MAX_TOKENS = 4, 256


class UnsupportedAttentionError(CapasError):
    """An error for a model that lacks an implementation of attention; the reports show its message."""


@dataclass(frozen=True)
class Comparison:
    """The facts, which are the same in every run on the same kernels, and the seconds, which are not."""

    facts: dict[str, Any]
    seconds: dict[str, float]  # {implementation: duration of a second pass over all sequences}


def compare(model: Any, sequences: Sequence[list[int]]) -> Comparison:
    """Compare the logits of the first sequences under both implementations; the model is left as it was.

    Args:
        model: a model of transformers, or PEFT's wrapper of one.
        sequences: token ids; the first MAX_TOKENS of each are used.
    """
    inner = unwrapped(model)
    inputs = [torch.tensor([ids[:MAX_TOKENS]]) for ids in sequences[:MAX_SEQUENCES]]
    facts = {
        "used": inner.config._attn_implementation,
        "dtype": str(inner.dtype).removeprefix("torch."),
        "device": inner.device.type,
        "num_sequences": len(inputs),
        "num_tokens": sum(ids.numel() for ids in inputs),
        "largest_logit": None,
        "largest_logit_difference": None,
        "num_same_next_token": None,
        "skipped": None,
    }
    try:
        found = {name: _computed_by(name, model, inner, inputs) for name in IMPLEMENTATIONS}
    except UnsupportedAttentionError as error:
        return Comparison(facts | {"skipped": str(error)}, {})
    (eager, eager_seconds), (sdpa, sdpa_seconds) = (found[name] for name in IMPLEMENTATIONS)
    pairs = list(zip(eager, sdpa, strict=True))
    facts |= {
        "largest_logit": max(float(a.abs().max()) for a in eager),
        "largest_logit_difference": max(float((a - b).abs().max()) for a, b in pairs),
        "num_same_next_token": sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
    }
    return Comparison(facts, {"eager": eager_seconds, "sdpa": sdpa_seconds})


def _computed_by(
    name: str, model: Any, inner: Any, inputs: list[torch.Tensor]
) -> tuple[list[torch.Tensor], float]:
    """Return the logits of each sequence, float32 on the CPU, and the seconds of a second pass."""
    with switched(inner, name), torch.inference_mode():
        logits = [model(ids.to(inner.device)).logits[0].float().cpu() for ids in inputs]
        begin = time.perf_counter()
        for ids in inputs:
            model(ids.to(inner.device)).logits[0, -1].cpu()  # waits for a GPU
        return logits, round(time.perf_counter() - begin, 4)


@contextmanager
def switched(inner: Any, name: str) -> Iterator[None]:
    """Make the model use this implementation in the block.

    Raises:
        UnsupportedAttentionError: the model lacks it, or computes another function with it.
    """
    kind, config = type(inner).__name__, inner.config
    if name == "sdpa" and getattr(config.get_text_config(), "attn_logit_softcapping", None):
        raise UnsupportedAttentionError(
            f"{kind} caps the logits of its attention, which sdpa leaves out"
        )
    before = config._attn_implementation
    try:
        inner.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise UnsupportedAttentionError(f"{kind} has no {name} attention: {error}") from None
    try:
        if config._attn_implementation != name:
            raise UnsupportedAttentionError(
                f"{kind} cannot change its attention from {before} to {name}"
            )
        yield
    finally:
        inner.set_attn_implementation(before)
