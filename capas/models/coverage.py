"""Say which parameters LoRA and quantization reach, and refuse a model that they reach too little of.

Both reach the weights of linear layers, each a matrix. transformers 5 keeps the experts of a layer in one
three-dimensional parameter, which neither reaches.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from capas.models.architecture import mixture_of_experts

if TYPE_CHECKING:
    from torch import nn

# The class names of modules that route tokens to experts, in transformers and in remote code.
_ROUTED = re.compile(r"(Experts|MoE|Moe|(MoE|Moe|MOE)(Block|Layer))$")


def unwrapped(model: Any) -> Any:
    """Return the model of transformers in PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def linear_layers(model: "nn.Module") -> "dict[str, nn.Module]":
    """Return {name: module} of the linear layers, which LoRA can adapt; GPT-2's are called Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = nn.Linear | Conv1D
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def quantizable(base: Any) -> "list[nn.Module]":
    """Return the linear layers that bitsandbytes quantizes: all but the head."""
    head = base.get_output_embeddings()
    return [layer for layer in linear_layers(base).values() if layer is not head]


def quantized_linears(model: "nn.Module") -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of every bitsandbytes layer."""
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(
            module, "base_layer"
        ):
            yield name, module


def check_modules_dense(model: Any, name: str) -> None:
    """Check that no module belongs to a mixture of experts, whatever config.json says.

    Raises:
        CapasError: a module does.
    """
    for path, module in model.named_modules():
        kind = type(module).__name__
        if _ROUTED.search(kind) or path.rpartition(".")[2] == "experts":
            raise mixture_of_experts(name, [type(model).__name__], f"layer {path} is a {kind}")
