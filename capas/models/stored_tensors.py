"""Read safetensors without torch: memory-mapped, as they are stored.

safetensors' numpy reader refuses bfloat16, in which most models are stored. The file format (a length, a
JSON header, the raw numbers) is simple enough to map it: https://github.com/huggingface/safetensors
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file; its numbers are read when they are needed."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # offset in the file, in bytes

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def raw(self) -> NDArray[Any]:
        """The numbers as stored, memory-mapped: [rows, ...]."""
        return np.memmap(self.file, _DTYPES[self.dtype], "r", self.start, self.shape)

    def flat(self, count: int | None) -> NDArray[Any]:
        """Return the first `count` numbers, or all: bytes unchanged, others as float32."""
        return self.as_float(self.raw.reshape(-1)[:count])

    def as_float(self, stored: Any) -> NDArray[Any]:
        """Return numbers of this tensor as float32; bytes stay bytes."""
        numbers = np.asarray(stored)
        if self.dtype == "BF16":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers if self.dtype == "U8" else numbers.astype(np.float32)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return {name: tensor} of a model folder, for the dtypes that can be read."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        header, start = read_header(file)
        for name, entry in sorted(header.items()):
            if entry["dtype"] in _DTYPES:
                place = start + entry["data_offsets"][0]
                found[name] = Tensor(file, entry["dtype"], tuple(entry["shape"]), place)
    return found


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return {tensor: {dtype, shape, data_offsets}} of a safetensors file, and where its numbers begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length
