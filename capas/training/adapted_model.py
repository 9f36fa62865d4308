"""The base with LoRA layers: added by PEFT, or by Unsloth, and checked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.training import lora, unsloth

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(base: "PreTrainedModel", params: Params, initial: Path | None = None) -> Any:
    """Freeze the base and add LoRA layers; their B is zero, so they change nothing at first.

    Norms, embeddings and head keep their dtype, in which the tuned model will be used. PEFT's
    `prepare_model_for_kbit_training`, which makes them float32, is for float16 alone, whose range is too
    small.

    Args:
        initial: the folder of an adapter whose weights the layers start with instead.

    Raises:
        CapasError: the lora group or the initial adapter does not fit the base.
    """
    lora.check_target_modules(base, params.lora.target_modules)
    add = unsloth.add_lora if params.trainer.backend == "unsloth" else add_with_peft
    model = add(base, params)
    lora.check_untied(model)
    if initial is not None:
        lora.load_initial(model, initial, params.model.model_name_or_path)
    return model


def add_with_peft(base: "PreTrainedModel", params: Params) -> Any:
    """Add LoRA layers with PEFT.

    Raises:
        CapasError: PEFT rejects the lora group.
    """
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import set_seed

    from capas.models.loading import quantization_method

    if quantization_method(base) != "none" and base.dtype == torch.float16:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    set_seed(params.trainer.seed)  # A is random
    try:
        return get_peft_model(base, lora.make_config(params.lora))
    except ValueError as error:
        raise CapasError(f"PEFT rejects the lora group: {error}") from None
