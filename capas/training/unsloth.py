"""Unsloth in place of transformers and PEFT where a training makes its model (trainer.backend=unsloth).

It replaces forward and backward of the layers by kernels of its own for NVIDIA GPUs. Records, batches,
Trainer, optimizer and the adapter's format stay what they are, and all other stages compute without it: what
comes out is judged by the model that users will load.

Of what it does beside that, capas switches off: counting its downloads, computing on a CPU after all, moving
embeddings to the CPU, and writing compiled code into the current folder. Its attention and what it compiles
give other last bits from run to run, so that deterministic algorithms cannot be asked for.
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
    """Import Unsloth; from then on transformers and PEFT are what it makes of them, in the whole process.

    Args:
        root: of the repository; what Unsloth compiles is kept in its .dvc/tmp.

    Raises:
        CapasError: it is not installed or refuses this machine, or what it patches was imported before.
    """
    extras.require("unsloth", "trainer.backend=unsloth")
    if early := [name for name in _PATCHED if name in sys.modules]:
        raise CapasError(f"Unsloth has to be imported before {', '.join(early)}")
    os.environ.setdefault("UNSLOTH_DISABLE_CPU_FALLBACK", "1")
    os.environ |= {
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(root / _COMPILED),
        "TORCHDYNAMO_DISABLE": "0",  # capas.models.hardware sets it; Unsloth compiles its loss and its layers
    }
    try:
        import unsloth  # noqa: F401
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise CapasError(f"Unsloth does not support this machine: {error}") from None


def load_base(
    folder: Path, tokenizer: Path, model: Params, max_length: int, device: "torch.device"
) -> "PreTrainedModel":
    """The base as Unsloth loads it, with the weights that `folder` holds.

    Args:
        folder, tokenizer: what quantize and fetch_tokenizer left.
        model: the params group.
        max_length: tokens of the longest row; Unsloth would stretch the positions of a model that has fewer.

    Raises:
        CapasError: no causal language model, one that Unsloth refuses, or one that it does not load as asked.
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
    """As `peft.get_peft_model`; A is drawn at random from trainer.seed, as PEFT draws it.

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
    model.peft_config["default"].auto_mapping = None  # what Unsloth notes for its own loader
    return model


def describe(base: Any) -> dict[str, Any] | None:
    """What it computes of a model; None: the forward is transformers' own.

    `fused` counts the layers whose LoRA is part of a kernel; there are none of a projection with a bias.
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
    """Where a function, a method or a part of one was written."""
    inner = getattr(function, "func", function)  # functools.partial
    return getattr(getattr(inner, "__func__", inner), "__module__", None) or ""


def _restore_embedding(model: "PreTrainedModel", folder: Path) -> None:
    """Unsloth sets the row of the pad token to zero where it is a row of its own.

    Raises:
        CapasError: it has another number of rows than before.
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
