"""A split of tokenized records as formatted ones, with the facts and checks that go with it."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from capas.chat.format import ChatFormat
from capas.chat.overflow import Overflow, count_supervised
from capas.errors import CapasError
from capas.records import Record

CHECKED_FIRST, CHECKED_EVERY = (
    200,
    20,
)  # records whose ids are compared with those of the rendered text
MAX_BINS = 40


@dataclass
class SplitFormatter:
    """Formats the records of one split, in order, and counts what it does."""

    split: str
    chat: ChatFormat
    train_on: str
    overflow: Overflow
    lengths: list[int] = field(default_factory=list)
    num_supervised_tokens: int = 0
    trailing_messages_cut: int = 0
    control_tokens_in_content: int = 0
    num_checked: int = 0

    def format(self, records: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
        """Yields (formatted record, the tokenized one that it comes from, as far as it was kept).

        Raises:
            CapasError: naming split and record: see `ChatFormat.encode`, `check_ids` and `Overflow.check`.
        """
        for index, record in enumerate(records):
            try:
                kept = self._keep(record)
                if kept is not None:
                    if index < CHECKED_FIRST or index % CHECKED_EVERY == 0:
                        self._check_ids(kept)
                    yield self._formatted(kept), kept
            except CapasError as error:
                raise CapasError(f"{self.split} record {record['id']!r}: {error}") from None
        self.overflow.check()

    def _keep(self, record: Record) -> Record | None:
        """The record as far as it is used, with its ids under `encoded`."""
        messages = _until_last_answer(record["messages"])
        encoded = self.chat.encode(messages, self.train_on)
        fitting = self.overflow.fit(
            {**record, "messages": messages}, encoded, self.chat, self.train_on
        )
        if fitting is None:
            return None
        self.trailing_messages_cut += len(record["messages"]) - len(messages)
        return {**record, "messages": fitting[0], "encoded": fitting[1]}

    def _formatted(self, kept: Record) -> Record:
        messages, encoded = kept["messages"], kept["encoded"]
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        self.lengths.append(len(encoded.input_ids))
        self.num_supervised_tokens += count_supervised(encoded)
        self.control_tokens_in_content += _count_control_tokens(messages, self.chat)
        return {
            "id": kept["id"],
            "input_ids": encoded.input_ids,
            "attention_mask": [1] * len(encoded.input_ids),
            "labels": encoded.labels,
            "prompt_ids": self.chat.prompt_ids(messages[:last]),
            "reference": messages[last]["content"],
            "metadata": kept["metadata"],
        }

    def _check_ids(self, kept: Record) -> None:
        """Compare with the rendered text, encoded whole; not where a content holds control tokens."""
        if _count_control_tokens(kept["messages"], self.chat):
            return
        expected, found = self.chat.reference_ids(kept["messages"]), kept["encoded"].input_ids
        self.num_checked += 1
        if found != expected:
            raise CapasError(_difference(found, expected, self.chat))

    def facts(self) -> dict[str, Any]:
        num_tokens = sum(self.lengths)
        return {
            "num_records": len(self.lengths),
            "num_tokens": num_tokens,
            "num_supervised_tokens": self.num_supervised_tokens,
            "supervised_fraction": self.num_supervised_tokens / num_tokens if num_tokens else 0.0,
            "max_tokens": max(self.lengths, default=0),
            "median_tokens": median(self.lengths) if self.lengths else 0,
            "truncated": self.overflow.truncated,
            "dropped": self.overflow.dropped,
            "supervised_tokens_lost": self.overflow.supervised_tokens_lost,
            "trailing_messages_cut": self.trailing_messages_cut,
            "control_tokens_in_content": self.control_tokens_in_content,
            "num_checked": self.num_checked,
        }


def _until_last_answer(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What follows the last answer is no part of any answer's context; it is cut and counted."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1] + 1] if answers else messages


def _count_control_tokens(messages: Sequence[Mapping[str, Any]], chat: ChatFormat) -> int:
    return sum(chat.count_control_tokens(message["content"]) for message in messages)


def _difference(found: list[int], expected: list[int], chat: ChatFormat) -> str:
    at = next(
        (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(expected)),
    )

    def show(ids: list[int]) -> str:
        near = ids[max(0, at - 3) : at + 5]
        return " ".join(f"{i}={chat.parsing_tokenizer.id_to_token(i)!r}" for i in near)

    return (
        f"its ids are not those of the rendered text, from token {at} on; the tokenizer does something at "
        "the borders of messages that capas does not know. Please report it with this record.\n"
        f"  message by message: {show(found)}\n  rendered text:      {show(expected)}"
    )


def histogram(lengths: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Rows of reports/lengths.csv: records per range of lengths, the same ranges for all splits.

    `num_tokens` is the lower edge of a range.
    """
    longest = max((length for of_split in lengths.values() for length in of_split), default=0)
    shortest = min((length for of_split in lengths.values() for length in of_split), default=0)
    width = _nice_width(longest - shortest + 1)
    edges = list(range(shortest // width * width, longest + 1, width))
    counts = {
        split: Counter(edges[bisect_right(edges, length) - 1] for length in of_split)
        for split, of_split in lengths.items()
    }
    return [
        {"split": split, "num_tokens": edge, "num_records": counts[split][edge]}
        for split in lengths
        for edge in edges
    ]


def _nice_width(span: int) -> int:
    """1, 2, 5, 10, 20, ...: the first that needs no more than `MAX_BINS` ranges."""
    for exponent in range(12):
        for step in (1, 2, 5):
            if span <= step * 10**exponent * (MAX_BINS - 1):
                return step * 10**exponent
    raise ValueError(f"no text has {span} tokens")
