"""Prepare messages as a chat template sees them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from capas.core.records import Record

Message = dict[str, Any]
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Any] | None
THOUGHT_START, THOUGHT_END = "<think>", "</think>"
TEMPLATE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
STRUCTURED = TEMPLATE_KEYS[2:]
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # names in different families


def conversation(record: Record) -> tuple[list[Message], Tools]:
    """Return the messages and tools of a stored record, their JSON parsed."""
    messages = [
        {**message, **json.loads(message["extra"])} if message["extra"] else message
        for message in record["messages"]
    ]
    return messages, json.loads(record["tools"]) if record["tools"] else None


def spoken(message: Mapping[str, Any]) -> Message:
    """Return the part of a message that a template may read; a thought appears under each of THOUGHT_KEYS."""
    visible = {key: message[key] for key in TEMPLATE_KEYS if key in message}
    if "reasoning_content" in visible:
        visible |= dict.fromkeys(THOUGHT_KEYS, visible["reasoning_content"])
    return visible


def has_own_scaffold(messages: Messages, tools: Tools) -> bool:
    """Return whether the scaffold depends on more than the roles, and must be found for this record alone."""
    return bool(tools) or any(
        m["role"] == "tool" or THOUGHT_END in m["content"] or any(key in m for key in STRUCTURED)
        for m in messages
    )


def split_thought(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return an answer's thought with its trailing whitespace, and the rest; templates treat them apart."""
    content: str = message["content"]
    if message["role"] != "assistant" or THOUGHT_END not in content:
        return "", content
    thought, end, rest = content.rpartition(THOUGHT_END)
    answer = rest.lstrip()
    return thought + end + rest[: len(rest) - len(answer)], answer
