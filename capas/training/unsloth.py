"""Load a model and add LoRA with Unsloth instead of transformers and PEFT (trainer.backend=unsloth).

Unsloth replaces forward and backward of the layers by its own kernels for NVIDIA GPUs. Records, batches,
Trainer, optimizer and the adapter's format stay the same. All other stages compute without it: the result is
judged with the model that users will load.

capas turns off other things that Unsloth does: it counts its downloads, falls back to the CPU, moves
embeddings to the CPU, and writes compiled code into the current folder. Its attention and its compiled code
give other last bits from run to run, so deterministic algorithms cannot be requested with it.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core import extras
from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.params import Params
from capas.training import lora

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_COMPILED = ".dvc/tmp/unsloth"
_PATCHED = ("transformers", "peft", "trl")
_FUSED = "unsloth.kernels.fast_lora"
_REFUSALS = (ValueError, RuntimeError, NotImplementedError, ImportError, TypeError)


def prepare(root: Path) -> None:
    """Import Unsloth, which replaces parts of transformers and PEFT in the whole process.

    Args:
        root: the repository; Unsloth's compiled code is kept in its .dvc/tmp.

    Raises:
        CapasError: Unsloth is not installed or does not support this machine, or a library that it patches
            was imported before.
    """
    extras.require("unsloth", "trainer.backend=unsloth")
    if early := [name for name in _PATCHED if name in sys.modules]:
        raise CapasError(f"Unsloth has to be imported before {', '.join(early)}")
    os.environ.setdefault("UNSLOTH_DISABLE_CPU_FALLBACK", "1")
    os.environ |= {
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(root / _COMPILED),
        "TORCHDYNAMO_DISABLE": "0",  # capas.models.hardware sets 1; Unsloth compiles its loss and layers
    }
    try:
        import unsloth  # noqa: F401
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise CapasError(f"Unsloth does not support this machine: {error}") from None


def load_base(
    folder: Path, tokenizer: Path, model: Params, max_length: int, device: "torch.device"
) -> "PreTrainedModel":
    """Load the base in `folder` with Unsloth, and check that it has the stored weights.

    Args:
        folder, tokenizer: the outputs of quantize and fetch_tokenizer.
        model: the params group.
        max_length: number of tokens in the longest row; if the model has fewer positions, Unsloth stretches
            them.

    Raises:
        CapasError: the model is not a causal language model, Unsloth refuses it, or it is not loaded as
            requested.
    """
    import torch
    from unsloth import FastLanguageModel

    from capas.models.architecture import check_supported, stored_quantization
    from capas.models.loading import check_loaded, check_quantized

    config = read_json(folder / "config.json")
    check_supported(config, str(folder))
    stored = stored_quantization(config, str(folder))
    try:
        loaded, _ = FastLanguageModel.from_pretrained(
            str(folder),
            tokenizer_name=str(tokenizer),
            max_seq_length=max_length,
            dtype=getattr(torch, model.dtype),
            load_in_4bit=stored is not None,
            device_map={"": device},
            offload_embedding=False,
            fix_tokenizer=False,
        )
    except torch.OutOfMemoryError:
        raise
    except (*_REFUSALS, OSError) as error:
        raise CapasError(f"Unsloth cannot load {model.model_name_or_path}: {error}") from None
    check_loaded({"dtype": model.dtype}, loaded)
    check_quantized(loaded, stored, folder)
    _restore_embedding(loaded, folder)
    return loaded


def add_lora(base: "PreTrainedModel", params: Params) -> Any:
    """Add LoRA layers like `peft.get_peft_model`; A is drawn at random from trainer.seed, as in PEFT.

    Raises:
        CapasError: Unsloth or PEFT refuses the lora group.
    """
    import torch
    from unsloth import FastLanguageModel

    try:
        model = FastLanguageModel.get_peft_model(
            base,
            **params.lora.without(*lora.OWN),
            use_gradient_checkpointing="unsloth"
            if params.trainer.gradient_checkpointing
            else False,
            random_state=params.trainer.seed,
        )
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        raise CapasError(f"Unsloth refuses the lora group: {error}") from None
    model.peft_config["default"].auto_mapping = None  # Unsloth sets it for its own loader
    return model


def describe(base: Any) -> dict[str, Any] | None:
    """Return what Unsloth computes of a model; None if the forward is that of transformers.

    `fused` counts the layers whose LoRA is part of a kernel; a projection with a bias is never one of them.
    """
    if not _module(base.forward).startswith("unsloth"):
        return None
    fused = dict.fromkeys(("mlp", "qkv", "o"), 0)
    for module in base.modules():
        for name, method in (("qkv", "apply_qkv"), ("o", "apply_o")):
            fused[name] += _module(getattr(module, method, None)) == _FUSED
        fused["mlp"] += "forward" in vars(module) and _module(module.forward) == _FUSED
    return {"version": extras.VERSIONS["unsloth"]["unsloth"], "fused": fused}


def _module(function: Any) -> str:
    """Return the module in which a function, a method or a partial function was defined."""
    inner = getattr(function, "func", function)  # functools.partial
    return getattr(getattr(inner, "__func__", inner), "__module__", None) or ""


def _restore_embedding(model: "PreTrainedModel", folder: Path) -> None:
    """Restore the embedding's stored weights: Unsloth sets the pad token's row to zero if it has its own.

    Raises:
        CapasError: the embedding has another number of rows than before.
    """
    import torch

    from capas.models.weights import read_weights

    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    for _, stored in read_weights(folder, [name]):
        if stored.shape != embedding.weight.shape:
            raise CapasError(
                f"Unsloth changed the vocabulary from {stored.shape[0]} to "
                f"{embedding.weight.shape[0]} tokens"
            )
        with torch.no_grad():
            embedding.weight.copy_(stored)
