"""What a training really computed with, and that it is what was asked for."""

from typing import Any

import torch
import transformers

from capas import hardware
from capas.errors import CapasError
from capas.model import quantization_method, quantized_linears
from capas.params import Params

_KERNELS = {"Linear4bit": "bitsandbytes.matmul_4bit", "Linear8bitLt": "bitsandbytes.matmul"}
_OPTIMIZERS = {
    "adamw_torch": "torch.optim.adamw.AdamW",
    "adamw_torch_fused": "torch.optim.adamw.AdamW",
    "sgd": "torch.optim.sgd.SGD",
    "adagrad": "torch.optim.adagrad.Adagrad",
    "rmsprop": "torch.optim.rmsprop.RMSprop",
    "adafactor": "transformers.optimization.Adafactor",
    "adamw_8bit": "bitsandbytes.optim.adamw.AdamW",
    "adamw_bnb_8bit": "bitsandbytes.optim.adamw.AdamW",
    "paged_adamw_8bit": "bitsandbytes.optim.adamw.AdamW",
    "paged_adamw_32bit": "bitsandbytes.optim.adamw.AdamW",
}


def describe(trainer: transformers.Trainer) -> dict[str, Any]:
    """The facts, read off the live objects. Nothing in it varies between machines that compute the same."""
    model, accelerator = trainer.model, trainer.accelerator
    adapter = next(p for p in model.parameters() if p.requires_grad)
    base = model.get_base_model()
    kernels = {_KERNELS[type(layer).__name__] for _, layer in quantized_linears(model)}
    return {
        **hardware.facts(adapter.device),
        "model_class": type(base).__name__,
        "dtype": _dtype(base.dtype),
        "adapter_dtype": _dtype(adapter.dtype),
        "attn_implementation": base.config._attn_implementation,
        "quantization": quantization_method(model),
        "linear_kernel": "+".join(sorted(kernels)) or "torch.nn.functional.linear",
        **_describe_optimizer(trainer.optimizer),
        "lr_scheduler_type": trainer.args.lr_scheduler_type.value,
        "gradient_checkpointing": bool(base.is_gradient_checkpointing),
        "accelerate": {
            "distributed_type": accelerator.distributed_type.value,
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "num_gpus_in_process": trainer.args.n_gpu,
        },
    }


def check(used: dict[str, Any], params: Params) -> None:
    """Compare with what was asked for.

    Raises:
        CapasError: naming each fact that differs.
    """
    asked = {
        "device": params.hardware.device,
        "num_threads": params.hardware.num_threads,
        "attn_implementation": params.model.attn_implementation,
        "optimizer": _OPTIMIZERS[params.trainer.optim],
        "lr_scheduler_type": params.trainer.lr_scheduler_type,
        "gradient_checkpointing": params.trainer.gradient_checkpointing,
        "mixed_precision": "bf16"
        if params.trainer.bf16
        else "fp16"
        if params.trainer.fp16
        else "no",
    }
    found = {**used, **used["accelerate"]}
    wrong = [
        f"{name} is {found[name]}, not {value}"
        for name, value in asked.items()
        if found[name] != value
    ]
    if found["num_gpus_in_process"] > 1:
        wrong.append(
            f"{found['num_gpus_in_process']} GPUs in one process, instead of `accelerate launch`"
        )
    if wrong:
        raise CapasError("the training would not use what was asked for: " + "; ".join(wrong))


def check_gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Prove that an evaluation leaves the gradients as they are (`capas.model` says why that may fail).

    Returns:
        Norm of all gradients of the adapter on `batch`, before and after an eval-mode forward.

    Raises:
        CapasError: they differ.
    """
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    before = _gradient_norm(model, batch)
    model.eval()
    with torch.inference_mode():
        model(**batch)
    after = _gradient_norm(model, batch)
    if before != after:
        raise CapasError(
            f"an evaluation changes the gradients: their norm is {before:g} before and {after:g} after it. "
            "Training would silently go wrong on this CPU; choose quantization=none and report the CPU."
        )
    return {"gradient_norm_before_evaluation": before, "gradient_norm_after_evaluation": after}


def _gradient_norm(model: Any, batch: dict[str, torch.Tensor]) -> float:
    model.train()
    with (
        torch.random.fork_rng()
    ):  # dropout draws the same numbers both times, and none of the training's
        torch.manual_seed(0)
        model(**batch).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    model.zero_grad()
    return norm


def _describe_optimizer(optimizer: Any) -> dict[str, Any]:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    states = [v for state in inner.state.values() for v in state.values() if torch.is_tensor(v)]
    return {
        "optimizer": f"{type(inner).__module__}.{type(inner).__name__}",
        "optimizer_fused": bool(inner.defaults.get("fused")),
        "optimizer_state_dtypes": sorted({_dtype(v.dtype) for v in states if v.numel() > 1}),
    }


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
