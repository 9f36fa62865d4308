"""Describe what a training really computed with, and check that it is what was requested."""

from importlib.metadata import version
from typing import Any

import torch
import transformers
from peft import PeftModel

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.models import hardware
from capas.models.coverage import quantized_linears
from capas.models.loading import quantization_method
from capas.training import unsloth
from capas.training.fused import is_fused
from capas.training.optimizers import OPTIMIZERS

_KERNELS = {"Linear4bit": "bitsandbytes.matmul_4bit", "Linear8bitLt": "bitsandbytes.matmul"}
_LINEAR = "torch.nn.functional.linear"


def describe(trainer: transformers.Trainer) -> dict[str, Any]:
    """Return the facts, read off the live objects. They are equal on machines that compute the same."""
    model, accelerator = trainer.model, trainer.accelerator
    trained = next(p for p in model.parameters() if p.requires_grad)
    is_whole = not isinstance(model, PeftModel)
    base = model if is_whole else model.get_base_model()
    kernels = {_KERNELS[type(layer).__name__] for _, layer in quantized_linears(model)}
    own = unsloth.describe(base)
    if own and any(own["fused"].values()):
        kernels.add("unsloth")
    return {
        **hardware.facts(trained.device),
        **({} if own is None else {"unsloth": own}),
        "model_class": type(base).__name__,
        "dtype": _dtype(base.dtype),
        **({} if is_whole else {"adapter_dtype": _dtype(trained.dtype)}),
        "attn_implementation": "unsloth" if own else base.config._attn_implementation,
        "quantization": quantization_method(model),
        "linear_kernel": "+".join(sorted(kernels)) or _LINEAR,
        **_describe_optimizer(trainer.optimizer),
        "lr_scheduler_type": trainer.args.lr_scheduler_type.value,
        "gradient_checkpointing": bool(base.is_gradient_checkpointing),
        "fused_lora": is_fused(model),
        "liger_kernel": _liger_kernel(base),
        "accelerate": {
            "distributed_type": accelerator.distributed_type.value,
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "num_gpus_in_process": trainer.args.n_gpu,
        },
    }


def check_trainer(trainer: transformers.Trainer, params: Params) -> None:
    """Check a trainer as `check` does, and the number of threads.

    The threads are not recorded: no byte depends on them.

    Raises:
        CapasError: see `check` and `check_trained`.
    """
    check_trained(trainer, all_weights=params.lora.r is None)
    check({**describe(trainer), "num_threads": torch.get_num_threads()}, params)


def check_trained(trainer: transformers.Trainer, all_weights: bool) -> None:
    """Check that the optimizer has exactly the weights that are to be trained.

    Raises:
        CapasError: it lacks some, or has others.
    """
    groups = trainer.optimizer.param_groups
    found = {id(weight) for group in groups for weight in group["params"]}
    wanted = {
        name: id(weight)
        for name, weight in trainer.model.named_parameters()
        if all_weights or "lora_" in name
    }
    if wrong := sorted(name for name, key in wanted.items() if key not in found):
        raise CapasError(f"training would not update {len(wrong)} weights, e.g. {wrong[0]}")
    if len(found) > len(wanted):
        raise CapasError(f"training would change {len(found) - len(wanted)} weights of the base")


def check(used: dict[str, Any], params: Params) -> None:
    """Compare the used settings with the requested ones.

    Raises:
        CapasError: settings differ; the message names each.
    """
    settings, machine = params.trainer, params.hardware
    mixed = [name for name in ("bf16", "fp16") if settings[name]]
    requested = {
        "device": machine.device,
        "num_threads": hardware.num_threads(machine, machine.num_processes),
        "deterministic_algorithms": machine.cudnn_deterministic or settings.full_determinism,
        "attn_implementation": params.model.attn_implementation,
        "optimizer": OPTIMIZERS[settings.optim].class_name,
        "optimizer_fused": settings.optim.endswith("_fused"),
        "optimizer_paged": settings.optim.startswith("paged_"),
        "optimizer_bits": 8 if "8bit" in settings.optim else 32,
        "loraplus_lr_ratio": settings.loraplus_lr_ratio or 1.0,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "fused_lora": settings.fused_lora,
        "liger_kernel": version("liger-kernel") if settings.use_liger_kernel else None,
        "mixed_precision": mixed[0] if mixed else "no",
        "num_processes": machine.num_processes,
        "distributed_type": _distributed_type(machine),
    }
    if machine.device == "cuda":
        requested["tf32"] = machine.allow_tf32
    if settings.backend == "unsloth":
        requested["attn_implementation"] = "unsloth"
    found = {**used, **used["accelerate"]}
    wrong = [
        f"{name} is {found[name]}, not {value}"
        for name, value in requested.items()
        if found[name] != value
    ]
    if found["num_gpus_in_process"] > 1:
        wrong.append(
            f"{found['num_gpus_in_process']} GPUs in one process, instead of `accelerate launch`"
        )
    if wrong:
        raise CapasError("training would not use the requested settings: " + "; ".join(wrong))


def _distributed_type(machine: Params) -> str:
    """Return accelerate's name of the distributed type."""
    if machine.num_processes == 1:
        return "NO"
    if machine.distributed_type == "fsdp2":
        return "FSDP"
    return "MULTI_CPU" if machine.device == "cpu" else "MULTI_GPU"


def check_gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, float] | None:
    """Check that an evaluation leaves the gradients unchanged (`models.kernels` explains why it might not).

    Returns:
        The norm of all gradients on `batch`, before and after a forward in eval mode. None if nothing can go
        wrong: on a GPU, or without quantized layers.

    Raises:
        CapasError: the norms differ.
    """
    if model.device.type != "cpu" or not any(quantized_linears(model)):
        return None
    before = _gradient_norm(model, batch)
    model.eval()
    with torch.inference_mode():
        model(**batch)
    after = _gradient_norm(model, batch)
    if before != after:
        raise CapasError(
            f"an evaluation changes the gradients: their norm is {before:g} before and {after:g} "
            "after. Training on this CPU would silently be wrong. Set quantization=none, and "
            "please report the CPU."
        )
    return {"gradient_norm_before_evaluation": before, "gradient_norm_after_evaluation": after}


def _gradient_norm(model: Any, batch: dict[str, torch.Tensor]) -> float:
    model.train()
    # dropout draws the same numbers both times, and none from the training's generator
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(**batch).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    model.zero_grad()
    return norm


def _describe_optimizer(optimizer: Any) -> dict[str, Any]:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    rates = [
        group.get("initial_lr", group["lr"]) for group in inner.param_groups if group["params"]
    ]
    states = [v for state in inner.state.values() for v in state.values() if torch.is_tensor(v)]
    return {
        "optimizer": f"{type(inner).__module__}.{type(inner).__name__}",
        "optimizer_fused": bool(inner.defaults.get("fused")),
        "optimizer_paged": bool(getattr(inner, "is_paged", False)),
        "optimizer_bits": inner.args.optim_bits if hasattr(inner, "args") else 32,
        "loraplus_lr_ratio": round(max(rates) / min(rates), 6),
        "optimizer_state_dtypes": sorted({_dtype(v.dtype) for v in states if v.numel() > 1}),
    }


def _liger_kernel(base: Any) -> str | None:
    """Return Liger's version if it replaced the model's own forward, otherwise None."""
    replaced = getattr(base.forward, "__func__", base.forward).__module__.partition(".")[0]
    return version("liger-kernel") if replaced == "liger_kernel" else None


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
