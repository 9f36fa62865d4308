"""Unsloth in place of transformers and PEFT where a training makes its model (trainer.backend=unsloth).

It replaces forward and backward of the layers by kernels of its own for NVIDIA GPUs. Records, batches,
Trainer, optimizer and the adapter's format stay what they are, and all other stages compute without it: what
comes out is judged by the model that users will load.

Of what it does beside that, capas switches off: counting its downloads, computing on a CPU after all, and
writing compiled code into the current folder.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas import extras, lora
from capas.errors import CapasError
from capas.facts import read_json
from capas.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMPILED = ".dvc/tmp/unsloth"
_PATCHED = ("transformers", "peft", "trl")


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
        "TORCHDYNAMO_DISABLE": "0",  # capas.hardware sets it; Unsloth compiles its loss
    }
    try:
        import unsloth  # noqa: F401
    except (ImportError, NotImplementedError) as error:
        raise CapasError(f"Unsloth refuses this machine: {error}") from None


def load_base(folder: Path, tokenizer: Path, model: Params, max_length: int) -> "PreTrainedModel":
    """The base as Unsloth loads it.

    Args:
        folder, tokenizer: what quantize and fetch_tokenizer left.
        model: the params group.
        max_length: tokens of the longest row.

    Raises:
        CapasError: no causal language model, one that Unsloth refuses, or quantized weights that it loads as
            if they were not.
    """
    import torch
    from unsloth import FastLanguageModel

    from capas.architecture import check_causal, stored_quantization
    from capas.model import check_quantized

    config = read_json(folder / "config.json")
    check_causal(config, str(folder))
    stored = stored_quantization(config, str(folder))
    try:
        loaded, _ = FastLanguageModel.from_pretrained(
            str(folder),
            tokenizer_name=str(tokenizer),
            max_seq_length=max_length,
            dtype=getattr(torch, model.dtype),
            load_in_4bit=stored is not None,
            fix_tokenizer=False,
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise CapasError(f"Unsloth refuses {model.model_name_or_path}: {error}") from None
    check_quantized(loaded, stored, folder)
    return loaded


def add_lora(base: "PreTrainedModel", params: Params) -> Any:
    """As `peft.get_peft_model`; A is drawn at random from trainer.seed, as PEFT draws it.

    Raises:
        ValueError: PEFT refuses the lora group.
    """
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(
        base,
        **params.lora.without(*lora.OWN),
        use_gradient_checkpointing="unsloth" if params.trainer.gradient_checkpointing else False,
        random_state=params.trainer.seed,
    )
    model.peft_config["default"].auto_mapping = None  # what Unsloth notes for its own loader
    return model


def version_of(model: Any) -> str | None:
    """Of what computes the model's forward; None: it is transformers' own."""
    forward = getattr(model.forward, "__func__", model.forward)
    is_own = forward.__module__.partition(".")[0].startswith("unsloth")
    return extras.VERSIONS["unsloth"]["unsloth"] if is_own else None
