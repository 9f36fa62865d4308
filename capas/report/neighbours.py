"""Read a model's safetensors without torch, and find the nearest neighbours in its embedding.

safetensors' numpy reader refuses bfloat16, in which most models are stored. The file format (a length, a
JSON header, the raw numbers) is simple enough to map it: https://github.com/huggingface/safetensors
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capas.core.files import read_json

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}
_CHUNK_ROWS = 8192


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


class Embedding:
    """The token embedding of a model folder.

    `shape` is (vocabulary size, hidden size).
    """

    def __init__(self, name: str, table: Tensor) -> None:
        self.name, self._table = name, table
        self.shape = table.shape

    @classmethod
    def find(cls, folder: Path) -> "Embedding | None":
        """Return the first tensor [vocab_size, hidden size] that is an input embedding, or None."""
        vocab_size = read_json(folder / "config.json").get("vocab_size")
        for name, tensor in tensors(folder).items():
            is_table = len(tensor.shape) == 2 and tensor.shape[0] == vocab_size
            if is_table and "lm_head" not in name and tensor.dtype != "U8":
                return cls(name, tensor)
        return None

    def rows(self, index: Any) -> NDArray[np.float32]:
        """Return rows as float32: [number of rows, hidden size]."""
        return self._table.as_float(self._table.raw[index])

    def neighbours(self, token_id: int, others: Sequence[int], k: int) -> list[tuple[int, float]]:
        """Return the k tokens among `others` whose rows have the largest cosine with that of `token_id`."""
        candidates = np.array([other for other in others if other != token_id])
        query = _unit(self.rows([token_id]))[0]
        chunks = range(0, len(candidates), _CHUNK_ROWS)
        parts = [_unit(self.rows(candidates[c : c + _CHUNK_ROWS])) @ query for c in chunks]
        cosines = np.concatenate(parts)
        cosines = np.round(cosines, 6)  # the last bits depend on the CPU
        best = np.lexsort((candidates, -cosines))[:k]  # ties: the smaller id first
        return [(int(candidates[i]), float(cosines[i])) for i in best]


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return {tensor: {dtype, shape, data_offsets}} of a safetensors file, and where its numbers begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), dtype=np.float32)
