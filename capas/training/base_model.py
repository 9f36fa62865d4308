"""Load the base for a training, make its weights trainable, and release it afterwards."""

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
    """Load the base in `folder` with trainer.backend, for records of up to `max_length` tokens.

    Raises:
        CapasError: see `load_plain` and `unsloth.load_base`.
    """
    if params.trainer.backend == "unsloth":
        return unsloth.load_base(folder, tokenizer, params.model, max_length, device)
    return load_plain(folder, params, device)


def load_plain(folder: Path, params: Params, device: "torch.device") -> "PreTrainedModel":
    """Load the base with transformers; on the CPU if FSDP2 will shard it, which moves the shards later.

    Raises:
        CapasError: the base is quantized and cannot be sharded, or see `load_model`.
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
    """Make all weights of the base trainable; warn if they are bfloat16."""
    import torch

    base.requires_grad_(True)
    if base.dtype == torch.bfloat16:
        log.warning(
            "the weights are bfloat16 (8 bits of precision): updates smaller than 1/256 of a "
            "weight are lost. To keep them, set model.dtype=float32 and trainer.bf16=true"
        )
    return base


def release(trainer: "Trainer") -> Any:
    """Return the trained model without mixed precision, and free the memory of gradients and optimizer."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.zero_grad()
    return model
