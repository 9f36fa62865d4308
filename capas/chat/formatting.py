"""Format a split of tokenized records, count what happens, and check the result."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from capas.chat.audit import Audit, Sampled
from capas.chat.batch import Batch, Columns, Formatted, Single, merge
from capas.chat.columns import ColumnEncoder
from capas.chat.format import ChatFormat, Encoded
from capas.chat.messages import Message, conversation
from capas.chat.overflow import Overflow
from capas.chat.template import RecordRefusal
from capas.core.errors import CapasError
from capas.core.ragged import Array, Ragged, any_in_row, texts_to_arrow, to_arrow
from capas.core.records import FORMATTED, IGNORE_INDEX, TEXT, Record

NUM_EXAMPLES = 20  # dropped records that the report shows
MAX_BINS = 40
_NOTHING = np.zeros(0, np.int64)
TEXT_PROMPT_TOKENS = 32  # tokens of a plain text that evaluation and samples use as its prompt


@dataclass
class Refused:
    """Conversations that the template refuses: an error, or dropped within a budget (`policy`)."""

    policy: str
    budget_fraction: float
    examples: list[dict[str, str]] = field(default_factory=list)
    count: int = 0

    def add(self, identity: str, refusal: RecordRefusal) -> None:
        """Count a refused record.

        Raises:
            CapasError: `policy` is error.
        """
        if self.policy == "error":
            raise CapasError(
                f"{refusal}\nTo drop such records: chat_template.refused=drop, with "
                "chat_template.refused_budget_fraction"
            )
        self.count += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append({"id": identity, "why": str(refusal)})

    def check(self, split: str, num_records: int) -> None:
        """Check that the refused records are within the budget.

        Raises:
            CapasError: there are too many.
        """
        if self.count > self.budget_fraction * num_records:
            first = "; ".join(f"{e['id']!r}: {e['why']}" for e in self.examples[:3])
            raise CapasError(
                f"the chat template refuses {self.count} of {num_records} {split} records, more "
                f"than chat_template.refused_budget_fraction={self.budget_fraction} allows. {first}"
            )


@dataclass
class SplitFormatter:
    """A formatter for the records of one split, in order, with counts for the report."""

    split: str
    chat: ChatFormat
    train_on: str
    overflow: Overflow
    refused: Refused
    lengths: list[Array] = field(default_factory=list)
    num_supervised_tokens: int = 0
    trailing_messages_cut: int = 0
    control_tokens_in_content: int = 0
    contents_trimmed: int = 0
    thoughts_dropped: int = 0

    def __post_init__(self) -> None:
        self._encoder = ColumnEncoder(self.chat, self.train_on)
        self._audit = Audit(self.chat, self.train_on)

    def format(self, batches: Iterable[pa.RecordBatch]) -> Iterator[Formatted]:
        """Yield the formatted records, batch by batch.

        Raises:
            CapasError: see `ChatFormat.encode`, `Audit` and `Refused`; the message names split and record.
        """
        for records in batches:
            source = Batch(records)
            formatted = self._format(source)
            self._count(formatted)
            self._audit.check(self.split, formatted)
            yield formatted
        self.refused.check(self.split, self.overflow.num_records)

    def _format(self, source: Batch) -> Formatted:
        quick = self._sure(self._encoder.encode(source), source)
        self.overflow.see(quick.ids.lengths)
        rest = sorted(set(range(source.num_rows)) - set(quick.rows.tolist()))
        singles = {row: single for row in rest if (single := self._single(source, row)) is not None}
        columns = merge([quick, _columns(singles)])
        held = self._hold_control(source)[columns.rows]
        batch = _batch(columns, source, singles)
        return Formatted(batch, source, columns, singles, held)

    def _hold_control(self, source: Batch) -> Array:
        """Return, per row, whether a content or a tool contains the text of a control token."""
        holds = self.chat.holds_control
        contents = np.array([holds(content) for content in source.contents], bool)
        tools = np.array([bool(text) and holds(text) for text in source.tools], bool)
        return any_in_row(contents, source.first) | tools

    def _sure(self, quick: Columns, source: Batch) -> Columns:
        """Return the conversations that fit and whose contents the template copies as they are."""
        fits = quick.ids.lengths <= self.overflow.max_length
        if not self.chat.copies_contents:
            copied = [self.chat.is_copied(source.messages(row)) for row in quick.rows.tolist()]
            fits &= np.array(copied, bool)
        return quick if fits.all() else quick.take(np.flatnonzero(fits))

    def _single(self, source: Batch, row: int) -> Single | None:
        """Return a conversation encoded separately, or None if it is dropped."""
        record: Record = source.records.slice(row, 1).to_pylist()[0]
        messages, tools = conversation(record)
        messages = messages[: source.last_answers[row] - int(source.first[row]) + 1]
        with self._named(record["id"]):
            try:
                encoded = self.chat.encode(messages, self.train_on, tools)
                kept = self.overflow.fit(
                    record["id"],
                    messages,
                    encoded,
                    lambda m: self.chat.encode(m, self.train_on, tools),
                )
                return kept and Single(row, *kept, *self._question(*kept))
            except RecordRefusal as refusal:
                self.overflow.num_records += 1
                self.refused.add(record["id"], refusal)
        return None

    def _question(self, messages: list[Message], encoded: Encoded) -> tuple[list[int], str]:
        """Return the prompt ids of the last answer, and that answer as text."""
        ids = encoded.input_ids
        if messages[-1]["role"] == TEXT:
            start = min(TEXT_PROMPT_TOKENS, len(ids) // 2)
            return ids[:start], self.chat.decode(ids[start:-1])
        prompt, answer = ids[: encoded.num_prompt_tokens], ids[encoded.num_prompt_tokens :]
        one_text = len(messages) < 2 or messages[-2]["role"] != "assistant"
        if one_text and not messages[-1].get("tool_calls"):
            return prompt, messages[-1]["content"]
        ends = (place for place, i in enumerate(answer) if i in self.chat.end_token_ids)
        return prompt, self.chat.decode(answer[: next(ends, None)])

    @contextmanager
    def _named(self, identity: str) -> Iterator[None]:
        try:
            yield
        except CapasError as error:
            raise CapasError(f"{self.split} record {identity!r}: {error}") from None

    def _count(self, formatted: Formatted) -> None:
        columns, source = formatted.columns, formatted.source
        self.lengths.append(columns.ids.lengths)
        self.num_supervised_tokens += int(columns.trained.values.sum())
        self.contents_trimmed += int(columns.trimmed.sum())
        for place in np.flatnonzero(formatted.held).tolist():
            messages = formatted.messages(place)
            self.control_tokens_in_content += sum(
                self.chat.count_control_tokens(message["content"]) for message in messages
            )
        after_last = source.first[1:] - 1 - np.array(source.last_answers)
        self.trailing_messages_cut += int(after_last[columns.rows].sum())
        for single in formatted.singles.values():
            self.thoughts_dropped += single.encoded.num_thoughts_dropped

    @property
    def sample(self) -> list[Sampled]:
        """The records that are compared with transformers' formatting."""
        return self._audit.sample

    def facts(self) -> dict[str, Any]:
        lengths = np.concatenate([_NOTHING, *self.lengths])
        num_tokens = int(lengths.sum())
        return {
            "num_records": len(lengths),
            "num_tokens": num_tokens,
            "num_supervised_tokens": self.num_supervised_tokens,
            "supervised_fraction": self.num_supervised_tokens / num_tokens if num_tokens else 0.0,
            "max_tokens": int(lengths.max(initial=0)),
            "median_tokens": median(lengths.tolist()) if num_tokens else 0,
            "truncated": self.overflow.truncated,
            "dropped": self.overflow.dropped,
            "supervised_tokens_lost": self.overflow.supervised_tokens_lost,
            "stop_tokens_lost": self.overflow.stop_tokens_lost,
            "refused": self.refused.count,
            "trailing_messages_cut": self.trailing_messages_cut,
            "contents_trimmed": self.contents_trimmed,
            "thoughts_dropped": self.thoughts_dropped,
            "control_tokens_in_content": self.control_tokens_in_content,
            "num_checked": self._audit.num_checked,
        }


def _columns(singles: Mapping[int, Single]) -> Columns:
    found = list(singles.values())
    encoded = [single.encoded for single in found]
    labels = [np.asarray(e.labels) != IGNORE_INDEX for e in encoded]
    return Columns(
        np.array(list(singles), np.int64),
        Ragged.of([e.input_ids for e in encoded], np.int32),
        Ragged.of(labels, bool),
        Ragged.of([single.prompt_ids for single in found], np.int32),
        np.array([e.num_trimmed for e in encoded], np.int64),
    )


def _batch(columns: Columns, source: Batch, singles: Mapping[int, Single]) -> pa.RecordBatch:
    rows = to_arrow(columns.rows, pa.int64())
    labels = np.where(columns.trained.values, columns.ids.values, np.int32(IGNORE_INDEX))
    references = [
        singles[row].reference if row in singles else source.contents[source.last_answers[row]]
        for row in columns.rows.tolist()
    ]
    ids = FORMATTED.field("input_ids").type
    columns_by_name = {
        "id": source.records.column("id").take(rows),
        "input_ids": columns.ids.to_arrow(ids),
        "labels": Ragged(labels, columns.ids.offsets).to_arrow(ids),
        "prompt_ids": columns.prompts.to_arrow(ids),
        "reference": texts_to_arrow(references),
        "metadata": source.records.column("metadata").take(rows),
    }
    return pa.RecordBatch.from_arrays(list(columns_by_name.values()), schema=FORMATTED)


def histogram(lengths: Mapping[str, Sequence[Array]]) -> list[dict[str, Any]]:
    """Return the rows of reports/lengths.csv: records per range of lengths, with equal ranges for all splits.

    `num_tokens` is the lower edge of a range.
    """
    by_split = {split: np.concatenate([_NOTHING, *of]) for split, of in lengths.items()}
    everything = np.concatenate([_NOTHING, *by_split.values()])
    longest, shortest = int(everything.max(initial=0)), int(everything.min(initial=10**9))
    shortest = min(shortest, longest)
    width = _nice_width(longest - shortest + 1)
    edges = list(range(shortest // width * width, longest + 1, width))
    counts = {
        split: np.bincount((of // width - edges[0] // width), minlength=len(edges))
        for split, of in by_split.items()
    }
    return [
        {"split": split, "num_tokens": edge, "num_records": int(counts[split][place])}
        for split in lengths
        for place, edge in enumerate(edges)
    ]


def _nice_width(span: int) -> int:
    """Return the first of 1, 2, 5, 10, 20, ... that needs no more than `MAX_BINS` ranges."""
    for exponent in range(12):
        for step in (1, 2, 5):
            if span <= step * 10**exponent * (MAX_BINS - 1):
                return step * 10**exponent
    raise ValueError(f"no text has {span} tokens")
