"""Read weights before and after 4-bit quantization from the files of both models, without torch.

bitsandbytes stores a layer as codes, two in a byte, and a scale for each block of weights; a code is the
number of a level. https://huggingface.co/docs/bitsandbytes/reference/nn/linear4bit
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capas.models.stored_tensors import Tensor, tensors

_STATE = ".quant_state.bitsandbytes__"
_MAX_WEIGHTS = 2**20  # a million weights show their distribution
_NUM_BINS = 81


def four_bit_levels(base: Path, quantized: Path) -> dict[str, Any] | None:
    """Return the distribution of one quantized layer's weights before, and the levels they take after.

    Args:
        base, quantized: folders of the same model.

    Returns:
        `layer`; `num_weights` counted; `edges` [bins + 1] and `before` [bins], the share of weights between
        two edges, each weight divided by the largest of its block; `levels` [16] and `after` [16], the share
        of weights at each level. None if no layer is stored in 4 bits, or the base lacks its weight.
    """
    stored, whole = tensors(quantized), tensors(base)
    for name in sorted(stored):
        weight, _, kind = name.partition(_STATE)
        if kind and weight in whole and stored[weight].dtype == "U8":
            state = json.loads(bytes(stored[name].flat(None)))
            return _compare(weight, whole[weight], stored, state["blocksize"])
    return None


def _compare(name: str, whole: Tensor, stored: dict[str, Tensor], block: int) -> dict[str, Any]:
    count = min(whole.size, _MAX_WEIGHTS) // block * block
    blocks = whole.flat(count).reshape(-1, block)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    relative = blocks / np.where(scale == 0, 1, scale)
    before, edges = np.histogram(relative, bins=_NUM_BINS, range=(-1, 1))
    packed = stored[name].flat(count // 2)
    codes = np.concatenate([packed >> 4, packed & 15])
    after = np.bincount(codes, minlength=16)
    return {
        "layer": name.removesuffix(".weight"),
        "num_weights": count,
        "edges": _rounded(edges),
        "before": _rounded(before / count),
        "levels": _rounded(stored[f"{name}.quant_map"].flat(None)),
        "after": _rounded(after / count),
    }


def _rounded(values: NDArray[Any]) -> list[float]:
    return [round(float(value), 6) for value in values]
