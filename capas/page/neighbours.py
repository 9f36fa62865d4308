"""Nearest neighbours in a model's embedding, read from its safetensors without torch.

safetensors' numpy reader refuses bfloat16, which most models are stored in; the file format (a
length, a JSON header, the raw numbers) is simple enough to map it: https://github.com/huggingface/safetensors
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capas.facts import read_json

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_CHUNK_ROWS = 8192


class Embedding:
    """The token embedding of a model folder; rows are read where they are needed.

    `shape` is (vocabulary size, hidden size).
    """

    def __init__(self, file: Path, name: str, entry: dict[str, Any], start: int) -> None:
        self.name = name
        self.shape: tuple[int, int] = tuple(entry["shape"])
        self._bfloat16 = entry["dtype"] == "BF16"
        offset = start + entry["data_offsets"][0]
        self._rows = np.memmap(file, _DTYPES[entry["dtype"]], "r", offset, self.shape)

    @classmethod
    def find(cls, folder: Path) -> "Embedding | None":
        """The first tensor of shape (vocab_size, ...) that is an input embedding; None if there is none."""
        vocab_size = read_json(folder / "config.json").get("vocab_size")
        for file in sorted(folder.glob("*.safetensors")):
            header, start = read_header(file)
            for name, entry in sorted(header.items()):
                is_table = len(entry["shape"]) == 2 and entry["shape"][0] == vocab_size
                if is_table and "lm_head" not in name and entry["dtype"] in _DTYPES:
                    return cls(file, name, entry, start)
        return None

    def rows(self, index: Any) -> NDArray[np.float32]:
        """Rows as float32: shape (number of rows, hidden size)."""
        rows = np.asarray(self._rows[index])
        if self._bfloat16:
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)

    def neighbours(self, token_id: int, others: Sequence[int], k: int) -> list[tuple[int, float]]:
        """The k tokens among `others` whose rows have the largest cosine with that of `token_id`."""
        candidates = np.array([other for other in others if other != token_id])
        query = _unit(self.rows([token_id]))[0]
        chunks = range(0, len(candidates), _CHUNK_ROWS)
        parts = [_unit(self.rows(candidates[c : c + _CHUNK_ROWS])) @ query for c in chunks]
        cosines = np.concatenate(parts)
        cosines = np.round(cosines, 6)  # the last bits depend on the CPU
        best = np.lexsort((candidates, -cosines))[:k]  # ties: the smaller id first
        return [(int(candidates[i]), float(cosines[i])) for i in best]


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """{tensor: {dtype, shape, data_offsets}} of a safetensors file, and where its numbers begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), dtype=np.float32)
