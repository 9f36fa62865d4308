"""Conversations formatted and audited as a split, without the stage."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from conftest import stored

from capas.chat.format import ChatFormat
from capas.chat.formatting import Refused, SplitFormatter
from capas.chat.overflow import Overflow
from capas.chat.tokenizer import TokenizerFiles, encode_plain
from capas.core.records import IGNORE_INDEX, TOKENIZED

Messages = list[dict[str, Any]]
PLAIN = ("role", "content", "train")


def split(
    chat: ChatFormat, told: list[Messages], train_on: str = "assistant", refused: str = "error"
) -> tuple[SplitFormatter, list[dict[str, Any]]]:
    """The formatter, for its counts, and the formatted records."""
    tokenizer = TokenizerFiles(chat._files.folder).build()
    records = [_tokenized(i, messages, tokenizer) for i, messages in enumerate(told)]
    batch = pa.RecordBatch.from_pylist(records, schema=TOKENIZED)
    overflow = Overflow("train", 10_000, "error", 0.0, chat.end_token_ids)
    formatter = SplitFormatter("train", chat, train_on, overflow, Refused(refused, 1.0))
    found = [row for part in formatter.format([batch]) for row in part.records.to_pylist()]
    return formatter, found


def trained(chat: ChatFormat, record: dict[str, Any]) -> list[str]:
    """The text of every trained stretch."""
    texts: list[list[int]] = []
    before = False
    for label in record["labels"]:
        if label != IGNORE_INDEX:
            texts = [*texts, []] if not before else texts
            texts[-1].append(label)
        before = label != IGNORE_INDEX
    return [chat.decode(ids) for ids in texts]


def load(template: str, folder: Path, **options: Any) -> ChatFormat:
    return ChatFormat.load(template, folder, "26 Jul 2024", **options)


def _tokenized(index: int, messages: Messages, tokenizer: Any) -> dict[str, Any]:
    ids = encode_plain(tokenizer, [m["content"] for m in messages])
    kept = [
        {**{k: m[k] for k in PLAIN if k in m}, "extra": _extra(m), "input_ids": i}
        for m, i in zip(messages, ids, strict=True)
    ]
    return stored({"id": str(index), "messages": kept, "metadata": "{}"})


def _extra(message: dict[str, Any]) -> str:
    more = {key: value for key, value in message.items() if key not in PLAIN}
    return json.dumps(more, ensure_ascii=False) if more else ""
