"""Represent tokenized records and formatted conversations as columns: lists of texts, flat arrays of ids."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from capas.chat.format import Encoded
from capas.chat.messages import THOUGHT_END, Message, Tools
from capas.core.ragged import Array, Ragged, concatenate, from_arrow
from capas.core.records import TEXT

Key = tuple[Any, ...]


class Batch:
    """A batch of tokenized records, with columns per message and `first`, each record's first message."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        messages = batch.column("messages")
        spoken = messages.flatten()
        self.records, self.num_rows = batch, batch.num_rows
        self.first = from_arrow(messages.offsets).astype(np.int64) - messages.offsets[0].as_py()
        self.roles: list[str] = spoken.field("role").to_pylist()
        self.texts = spoken.field("content")
        self.contents: list[str] = self.texts.to_pylist()
        self.trained: list[bool] = spoken.field("train").to_pylist()
        self.ids = Ragged.from_arrow(spoken.field("input_ids"))
        self.tools: list[str] = batch.column("tools").to_pylist()
        self.last_answers = self._find_last_answers()
        self._patterns = self._find_patterns(spoken.field("extra").to_pylist())

    def messages(self, row: int) -> list[Message]:
        """Return a record's messages up to its last answer; later messages are in no answer's context."""
        return [
            {"role": self.roles[m], "content": self.contents[m], "train": self.trained[m]}
            for m in range(self.first[row], self.last_answers[row] + 1)
        ]

    def key(self, row: int) -> Key | None:
        """Return the pattern of a conversation, or None if its scaffold depends on more than a pattern."""
        key = tuple(self._patterns[self.first[row] : self.last_answers[row] + 1])
        return None if self.tools[row] or None in key else key

    def _find_patterns(self, extras: list[str]) -> list[Any]:
        """Return, for each message, its part of the conversation's pattern: usually its role."""
        found: list[Any] = list(self.roles)
        messages = zip(self.roles, self.contents, extras, self.trained, strict=True)
        for m, (role, content, extra, trained) in enumerate(messages):
            if extra or role == "tool" or role == TEXT or THOUGHT_END in content:
                found[m] = None  # the scaffold depends on the content, too
            elif not trained or not content or content.isspace():
                found[m] = role, trained, None if content.strip() else content
        return found

    def _find_last_answers(self) -> list[int]:
        """Return the index of each conversation's last answer, or of its last message if it has no answer."""
        found = []
        for start, end in zip(self.first[:-1].tolist(), self.first[1:].tolist(), strict=True):
            last = end - 1
            while last > start and self.roles[last] != "assistant":
                last -= 1
            found.append(last if self.roles[last] == "assistant" else end - 1)
        return found


@dataclass(frozen=True)
class Columns:
    """Formatted conversations: token ids, whether each is trained, and the ids of the last answer's prompt.

    `rows` has indices into the batch, [conversations]. The other columns have one row for each of them.
    """

    rows: Array
    ids: Ragged
    trained: Ragged
    prompts: Ragged
    trimmed: Array  # [conversations], number of contents whose whitespace the template trims

    def take(self, places: Array) -> "Columns":
        ids, trained, prompts = (
            ragged.take(places) for ragged in (self.ids, self.trained, self.prompts)
        )
        return Columns(self.rows[places], ids, trained, prompts, self.trimmed[places])


def merge(parts: Sequence[Columns]) -> Columns:
    """Return the conversations of all parts, in the order of the batch."""
    rows = np.concatenate([part.rows for part in parts])
    together = Columns(
        rows,
        concatenate(part.ids for part in parts),
        concatenate(part.trained for part in parts),
        concatenate(part.prompts for part in parts),
        np.concatenate([part.trimmed for part in parts]),
    )
    return together if np.all(np.diff(rows) > 0) else together.take(np.argsort(rows, kind="stable"))


@dataclass(frozen=True)
class Single:
    """A conversation that was encoded separately."""

    row: int
    messages: list[Message]  # those that were kept
    encoded: Encoded
    prompt_ids: list[int]
    reference: str


@dataclass(frozen=True)
class Formatted:
    """A batch of formatted records with their source."""

    records: pa.RecordBatch
    source: Batch
    columns: Columns
    singles: Mapping[int, Single]  # by row
    held: Array  # [records] bool: whether a content or a tool contains the text of a control token

    @cached_property
    def num_messages(self) -> Array:
        """The number of messages kept in each record, [records]."""
        rows, source = self.columns.rows, self.source
        counts = np.array(source.last_answers)[rows] + 1 - source.first[rows]
        for place, row in enumerate(rows.tolist()):
            if row in self.singles:
                counts[place] = len(self.singles[row].messages)
        return counts

    def identity(self, place: int) -> str:
        identity: str = self.records.column("id")[place].as_py()
        return identity

    def tools(self, place: int) -> Tools:
        text = self.source.tools[int(self.columns.rows[place])]
        return json.loads(text) if text else None

    def messages(self, place: int) -> list[Message]:
        """Return the messages kept in a formatted record."""
        row = int(self.columns.rows[place])
        return self.singles[row].messages if row in self.singles else self.source.messages(row)
