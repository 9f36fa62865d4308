"""The optimizers of trainer.optim: their classes, what they keep in memory, and where their bytes repeat."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

FLOAT32_BYTES = 4
_BLOCK, _SMALLEST = 256, 4096  # of 8-bit AdamW; smaller tensors stay in float32
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Optimizer:
    """One value of trainer.optim.

    Args:
        class_name: the class that Trainer makes of it.
        state_bytes: bytes that it keeps from step to step for a parameter of a shape, in float32.
        as_weights: keeps its state in the parameter's own type.
        is_portable: calls no vector function of oneMKL, so Intel and AMD compute the same bytes.
    """

    class_name: str
    state_bytes: Callable[[Shape], int]
    as_weights: bool = False
    is_portable: bool = False


def state_bytes(optim: str, shapes: Iterable[Shape], element_size: int = FLOAT32_BYTES) -> int:
    """Return what an optimizer keeps from step to step for parameters of these shapes.

    Args:
        element_size: bytes of a parameter's number.

    Raises:
        KeyError: an optimizer that is not in the schema.
    """
    found = OPTIMIZERS[optim]
    kept = sum(map(found.state_bytes, shapes))
    return kept * element_size // FLOAT32_BYTES if found.as_weights else kept


def _floats(number: int) -> Callable[[Shape], int]:
    return lambda shape: FLOAT32_BYTES * number * math.prod(shape)


def _eight_bit(shape: Shape) -> int:
    """Return two moments of a byte each and their scales (Dettmers et al. 2021, block-wise quantization)."""
    number = math.prod(shape)
    if number < _SMALLEST:
        return 2 * FLOAT32_BYTES * number
    return 2 * (number + FLOAT32_BYTES * -(-number // _BLOCK))


def _factored(shape: Shape) -> int:
    """Return Adafactor's second moment, as rows and columns of a matrix (Shazeer and Stern 2018)."""
    if len(shape) < 2:
        return FLOAT32_BYTES * math.prod(shape)
    return FLOAT32_BYTES * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


_ADAMW, _BITSANDBYTES = "torch.optim.adamw.AdamW", "bitsandbytes.optim.adamw.AdamW"
OPTIMIZERS = {
    "adamw_torch": Optimizer(_ADAMW, _floats(2), as_weights=True),
    "adamw_torch_fused": Optimizer(_ADAMW, _floats(2), as_weights=True, is_portable=True),
    # no momentum: Trainer gives it none
    "sgd": Optimizer("torch.optim.sgd.SGD", _floats(0), is_portable=True),
    "adagrad": Optimizer("torch.optim.adagrad.Adagrad", _floats(1), as_weights=True),
    "rmsprop": Optimizer("torch.optim.rmsprop.RMSprop", _floats(1), as_weights=True),
    "adafactor": Optimizer("transformers.optimization.Adafactor", _factored),
    "adamw_8bit": Optimizer(_BITSANDBYTES, _eight_bit),
    "adamw_bnb_8bit": Optimizer(_BITSANDBYTES, _eight_bit),
    "paged_adamw_8bit": Optimizer(_BITSANDBYTES, _eight_bit),
    "paged_adamw_32bit": Optimizer(_BITSANDBYTES, _floats(2)),
}
