"""Compute LoRA on 4-bit layers with fewer passes over memory than PEFT's own forward: the same products.

PEFT computes `clone(x W) + (x A) B * scaling`: beside the products, five passes over a tensor of the layer's
output size. Here the product with B is added to x W in place, and backward does the same for the gradient.

In a checkpointed block the base's product of the last layer (down_proj) is not recomputed. The tensors that
the backward pass of that layer needs are saved before the product, and torch stops a recomputation at the
last saved tensor. That saves a quarter of a recomputation.

Weights, gradients and optimizer are unchanged, and so is every pass without gradients.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear

from capas.core.errors import CapasError

_PLAIN = (torch.bfloat16, torch.float16)


def fuse(model: torch.nn.Module) -> None:
    """Give the LoRA layers of a `PeftModel` the fused forward.

    Raises:
        CapasError: a layer has dropout, DoRA, a bias of LoRA, or no 4-bit weight, for which the sum above is
            wrong.
    """
    for name, layer in _lora_layers(model):
        if not _is_plain(layer):
            raise CapasError(
                f"trainer.fused_lora=true, but {name} is not a plain LoRA layer on a 4-bit weight. "
                "Set trainer.fused_lora=false"
            )
        layer.forward = MethodType(_forward, layer)  # on the instance; the class keeps PEFT's


def is_fused(model: torch.nn.Module) -> bool:
    """Return whether there are LoRA layers and all of them have the fused forward."""
    own = [getattr(m.forward, "__func__", None) is _forward for _, m in _lora_layers(model)]
    return bool(own) and all(own)


def _lora_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]


def _is_plain(layer: Any) -> bool:
    from peft.tuners.lora.bnb import Linear4bit

    return (
        isinstance(layer, Linear4bit)
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        and "default" not in layer.lora_variant
        and not layer.lora_bias["default"]
    )


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(x.device.type)
    plain = self.active_adapters == ["default"] and not (self.disable_adapters or self.merged)
    mixed = torch.is_autocast_enabled(x.device.type) and dtype in _PLAIN
    if not (torch.is_grad_enabled() and plain and mixed) or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    a, b = (self.lora_A["default"].weight, self.lora_B["default"].weight)
    base = self.base_layer
    is_last = base.out_features < base.in_features  # down_proj, the last layer of a block
    compute = _last if is_last else _Linear.apply
    return compute(x.to(dtype), a, b, base.weight, base.bias, self.scaling["default"])


def _last(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: Any, bias: Any, scaling: float
) -> Any:
    """Compute the last layer of a block, LoRA first: what LoRA saves is all that backward needs."""
    adapted = linear(linear(x, a), b)
    return _Frozen.apply(x, adapted, weight, bias, scaling)


def _product(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x, _dequantized(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def _dequantized(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [out, in] in `dtype`."""
    import bitsandbytes as bnb

    found: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return found.to(dtype)


class _Frozen(torch.autograd.Function):
    """The sum x W + scaling * adapted, [..., out], where `adapted` is LoRA's product; it saves no tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, adapted: torch.Tensor, weight: Any, bias: Any, scaling: float
    ) -> torch.Tensor:
        ctx.weight, ctx.scaling = weight, scaling
        return _product(x, weight, bias).add_(adapted, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        of_x = gradient @ _dequantized(ctx.weight, gradient.dtype)
        return of_x, gradient * ctx.scaling, None, None, None


class _Linear(torch.autograd.Function):
    """The sum x W + scaling (x A) B, where W and bias are frozen.

    Shapes: x [..., in], A [r, in] and B [out, r] in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: Any,
        bias: Any,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        inner = rows @ low_a.T
        output = _product(rows, weight, bias).addmm_(inner, low_b.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, low_a, low_b)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, inner, low_a, low_b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1]).to(rows.dtype)
        through_b = gradient @ low_b
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _dequantized(ctx.weight, rows.dtype)
            of_x = of_x.addmm_(through_b, low_a, alpha=ctx.scaling).view(ctx.shape)
        of_a = (through_b.T @ rows).float().mul_(ctx.scaling)
        of_b = (gradient.T @ inner).float().mul_(ctx.scaling)
        return of_x, of_a, of_b, None, None, None
