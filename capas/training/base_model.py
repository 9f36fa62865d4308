"""The base as a training takes it, and gives it back."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.training import unsloth

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from capas.training.trainer import Trainer

log = logging.getLogger("capas")


def load_base(
    folder: Path, tokenizer: Path, params: Params, max_length: int, device: "torch.device"
) -> "PreTrainedModel":
    """Load the base in `folder` as trainer.backend does, for records of up to `max_length` tokens."""
    if params.trainer.backend == "unsloth":
        return unsloth.load_base(folder, tokenizer, params.model, max_length, device)
    return load_plain(folder, params, device)


def load_plain(folder: Path, params: Params, device: "torch.device") -> "PreTrainedModel":
    """Of a model that will be divided, the parts go to the GPUs later, one by one.

    Raises:
        CapasError: it comes quantized, and should be divided.
    """
    import torch

    from capas.models.loading import load_model, quantization_method

    if params.hardware.distributed_type == "ddp":
        return load_model(folder, params.model, device)
    base = load_model(folder, params.model, torch.device("cpu"))
    if (method := quantization_method(base)) != "none":
        raise CapasError(
            f"hardware.distributed_type=fsdp2 cannot shard {params.model.model_name_or_path}, whose "
            f"weights are {method}. Choose ddp, or a model that is not quantized"
        )
    return base


def unfreeze(base: "PreTrainedModel") -> "PreTrainedModel":
    """The base, all of whose weights are trained."""
    import torch

    base.requires_grad_(True)
    if base.dtype == torch.bfloat16:
        log.warning(
            "the weights are bfloat16 (8 bits of precision): updates smaller than 1/256 of a "
            "weight are lost. To keep them, set model.dtype=float32 and trainer.bf16=true"
        )
    return base


def release(trainer: "Trainer") -> Any:
    """The trained model outside of mixed precision; gradients and optimizer go: their memory is needed."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.zero_grad()
    return model
