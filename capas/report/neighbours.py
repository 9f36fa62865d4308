"""Find the nearest neighbours of a token in a model's embedding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capas.core.files import read_json
from capas.models.stored_tensors import Tensor, tensors

_CHUNK_ROWS = 8192


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


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), dtype=np.float32)
