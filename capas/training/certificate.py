"""Check the saved model against the trained one; the results are the certificate."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from capas.core.errors import CapasError
from capas.models.weights import check_finite
from capas.training import lora
from capas.training.batches import compute_logits, whole

WEIGHTS = "adapter_model.safetensors"
_MAX_DIFFERENCE = 1e-5  # as a fraction of the largest logit or weight


def fingerprint(model: torch.nn.Module) -> str:
    """Return the SHA-256 of all weights except LoRA's.

    Quantized weights count as they are stored, tied weights count twice. Floats count by their value:
    bitsandbytes casts the biases of 4-bit layers in their first forward pass.

    Collective for a sharded model: every process must call it.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "lora_" not in name and torch.is_tensor(value):
            kept = whole(value.detach()).cpu()
            kept = kept.float() if kept.is_floating_point() else kept
            digest.update(f"{name} {tuple(kept.shape)}".encode())
            digest.update(kept.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_adapter(
    model: Any,
    folder: Path,
    batch: dict[str, torch.Tensor],
    base: str,
    initial: Path | None = None,
) -> dict[str, Any]:
    """Check the adapter that was just saved against the model that was trained.

    Args:
        model: the `PeftModel` after its last step.
        folder: the folder of the saved adapter.
        batch: records whose logits are compared.
        base: `fingerprint` of the model before the training.
        initial: the folder of the adapter that the training started from, if any.

    Returns:
        The facts, for the certificate.

    Raises:
        CapasError: a weight is not finite, nothing was learned, the base was changed, or the saved adapter
            gives other logits than the trained one (for a sharded model: has other weights).
    """
    weights = load_file(folder / WEIGHTS)
    check_finite("the adapter", weights)
    outer = {name: weight for name, weight in weights.items() if "lora_B" in name}
    zero = sorted(name for name, weight in outer.items() if not weight.any())
    if outer and len(zero) == len(outer):
        raise CapasError(
            "nothing was learned: every lora_B is still zero. Check that trainer.learning_rate is "
            "large enough and that some tokens are trained (reports/mask.html)"
        )
    if initial is not None and _are_equal(weights, load_file(initial / WEIGHTS)):
        raise CapasError(
            "nothing was learned: the adapter equals the initial adapter. Check that "
            "trainer.learning_rate is large enough and that some tokens are trained "
            "(reports/mask.html)"
        )
    if fingerprint(model) != base:
        raise CapasError("training changed weights of the base model, which must stay frozen")
    divided = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    what = "weight" if divided else "logit"
    difference = _of_weights(model, weights) if divided else _of_logits(model, folder, batch)
    _check_difference("adapter", what, difference)
    return {
        "num_weights": sum(weight.numel() for weight in weights.values()),
        "all_finite": True,
        "num_lora_b": len(outer),
        "num_lora_b_zero": len(zero),
        "base_sha256": base,
        "base_unchanged": True,
        f"reloaded_{what}_difference": difference,
    }


def check_whole(
    model: torch.nn.Module,
    folder: Path,
    batch: dict[str, torch.Tensor],
    base: str,
    load: Callable[[], torch.nn.Module],
) -> dict[str, Any]:
    """Check the saved model against the trained one, if all weights were trained.

    Args:
        model: the model after its last step, without mixed precision.
        folder: the folder of the saved model.
        batch, base: see `check_adapter`.
        load: loads the model in `folder`, as a second one beside `model`.

    Returns:
        The facts, for the certificate.

    Raises:
        CapasError: a weight is not finite, no weight was changed, or the saved model gives other logits than
            the trained one.
    """
    num_weights = 0
    for file in sorted(folder.glob("*.safetensors")):
        weights = load_file(file)
        check_finite("the model", weights)
        num_weights += sum(weight.numel() for weight in weights.values())
    if fingerprint(model) == base:
        raise CapasError(
            "nothing was learned: no weight changed. Check that trainer.learning_rate is large "
            "enough for the dtype of the weights and that some tokens are trained "
            "(reports/mask.html)"
        )
    trained = compute_logits(model, batch)
    difference = _difference(trained, compute_logits(load(), batch))
    _check_difference("model", "logit", difference)
    return {
        "num_weights": num_weights,
        "all_finite": True,
        "base_sha256": base,
        "weights_changed": True,
        "reloaded_logit_difference": difference,
    }


def _check_difference(saved: str, what: str, difference: float) -> None:
    if not difference <= _MAX_DIFFERENCE:  # true for NaN, too
        raise CapasError(
            f"the saved {saved} does not reproduce the {what}s of the trained model: the largest "
            f"difference is {difference:.3g} of the largest {what}"
        )


def _are_equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(weight.equal(others[name].to(weight.dtype)) for name, weight in weights.items())


def _of_weights(model: Any, saved: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of weights, as a fraction of the largest weight.

    It replaces `_of_logits` for a sharded model, which cannot load a second adapter.
    """
    from peft import get_peft_model_state_dict

    named = {name: weight.cpu() for name, weight in lora.whole_weights(model).items()}
    trained = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    if trained.keys() != saved.keys():
        return float("inf")
    largest = max(weight.abs().max() for weight in trained.values())
    return float(max((trained[name] - saved[name]).abs().max() for name in saved) / largest)


def _of_logits(model: Any, folder: Path, batch: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of logits, as a fraction of the largest one, with the saved adapter."""
    trained = compute_logits(model, batch)
    model.load_adapter(str(folder), "saved")
    model.set_adapter("saved")
    saved = compute_logits(model, batch)
    model.set_adapter("default")
    model.delete_adapter("saved")
    return _difference(trained, saved)


def _difference(trained: torch.Tensor, saved: torch.Tensor) -> float:
    """Return the largest difference, as a fraction of the largest logit."""
    return float((trained.float() - saved.float()).abs().max() / trained.float().abs().max())
