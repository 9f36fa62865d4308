"""Tokenized records and formatted conversations as columns: lists of texts, flat arrays of ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from capas.chat.messages import TEXT, THOUGHT_END, Message
from capas.ragged import Array, Ragged, concatenate

Key = tuple[Any, ...]


class Batch:
    """Tokenized records."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        messages = batch.column("messages")
        fields = messages.flatten()
        self.records, self.num_rows = batch, batch.num_rows
        self.first = messages.offsets.to_numpy().astype(np.int64) - messages.offsets[0].as_py()
        self.roles: list[str] = fields.field("role").to_pylist()
        self.contents: list[str] = fields.field("content").to_pylist()
        self.extras: list[str] = fields.field("extra").to_pylist()
        self.trained: list[bool] = fields.field("train").to_pylist()
        self.ids = Ragged.from_arrow(fields.field("input_ids"))
        self.tools: list[str] = batch.column("tools").to_pylist()
        self.last_answers = self._find_last_answers()

    def messages(self, row: int) -> list[Message]:
        """The messages up to the last answer; what follows it is no part of any answer's context."""
        return [
            {"role": self.roles[m], "content": self.contents[m], "train": self.trained[m]}
            for m in range(self.first[row], self.last_answers[row] + 1)
        ]

    def key(self, row: int) -> Key | None:
        """The pattern of a conversation; None where its scaffold depends on more than that."""
        key: list[Any] = []
        if self.tools[row]:
            return None
        for m in range(self.first[row], self.last_answers[row] + 1):
            role, content = self.roles[m], self.contents[m]
            if self.extras[m] or role in ("tool", TEXT) or THOUGHT_END in content:
                return None
            key.append(role)
            if not self.trained[m] or not content or content.isspace():
                key.append((self.trained[m], "" if content.strip() else content))
        return tuple(key)

    def _find_last_answers(self) -> list[int]:
        """Index of a conversation's last answer, or of its last message where it has none."""
        found = []
        for start, end in zip(self.first[:-1].tolist(), self.first[1:].tolist(), strict=True):
            last = end - 1
            while last > start and self.roles[last] != "assistant":
                last -= 1
            found.append(last if self.roles[last] == "assistant" else end - 1)
        return found


@dataclass(frozen=True)
class Columns:
    """Formatted conversations: ids, whether each is trained, and the ids of the last answer's prompt.

    rows: [conversations], indices into the batch; one row each in the others.
    """

    rows: Array
    ids: Ragged
    trained: Ragged
    prompts: Ragged

    def take(self, places: Array) -> "Columns":
        parts = (ragged.take(places) for ragged in (self.ids, self.trained, self.prompts))
        return Columns(self.rows[places], *parts)


def merge(parts: Sequence[Columns]) -> Columns:
    """All conversations in the order of the batch."""
    rows = np.concatenate([part.rows for part in parts])
    together = Columns(
        rows,
        concatenate(part.ids for part in parts),
        concatenate(part.trained for part in parts),
        concatenate(part.prompts for part in parts),
    )
    return together if np.all(np.diff(rows) > 0) else together.take(np.argsort(rows, kind="stable"))
