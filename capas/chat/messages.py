"""Messages as a chat template sees them, and texts in them that no token may be made of.

A content is put into the rendered text by capas itself (`capas.chat.scaffold`). What a template writes in its
own way (tool calls and results, schemas of tools, thoughts) has to go through it. Control tokens in there are
hidden from the cutter, character by character, and come back before anything is encoded.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from capas.records import Record

Message = dict[str, Any]
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Any] | None
TEXT = "text"  # the role of a plain text: no template, all of it trained
THOUGHT_END = "</think>"
TEMPLATE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
_STRUCTURED = TEMPLATE_KEYS[2:]
_HIDDEN = 0xF0000  # supplementary private use area A
_HIDDEN_TEXT = re.compile("[\U000f0000-\U000fffff]")


def conversation(record: Record) -> tuple[list[Message], Tools]:
    """The messages and tools of a stored record, their JSON parsed."""
    told = [
        {**message, **json.loads(message["extra"])} if message["extra"] else message
        for message in record["messages"]
    ]
    return told, json.loads(record["tools"]) if record["tools"] else None


def spoken(message: Mapping[str, Any]) -> Message:
    """What a template may read of a message."""
    return {key: message[key] for key in TEMPLATE_KEYS if key in message}


def has_own_scaffold(messages: Messages, tools: Tools) -> bool:
    """Whether the template's part depends on more than the roles: it is then found for this record alone."""
    return bool(tools) or any(
        m["role"] == "tool" or THOUGHT_END in m["content"] or any(key in m for key in _STRUCTURED)
        for m in messages
    )


def split_thought(message: Mapping[str, Any]) -> tuple[str, str]:
    """An answer's thought with the blanks after it, and the rest; templates treat the two differently."""
    content: str = message["content"]
    if message["role"] != "assistant" or THOUGHT_END not in content:
        return "", content
    thought, end, rest = content.rpartition(THOUGHT_END)
    answer = rest.lstrip()
    return thought + end + rest[: len(rest) - len(answer)], answer


class Hider:
    """Hides texts of control tokens in what goes through a template.

    Args:
        pattern: finds them.
    """

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern

    def hide(self, value: Any) -> Any:
        """The same value, JSON's kinds only, of the same lengths, with private characters for those texts."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: _hidden(found.group()), value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list | tuple) else value

    def protect(self, message: Mapping[str, Any]) -> Message:
        """A message whose structured parts are safe; `thought` is the beginning of an answer's content."""
        safe = {
            **message,
            **{key: self.hide(message[key]) for key in _STRUCTURED if key in message},
        }
        if message["role"] == "tool":
            safe["content"] = self.hide(message["content"])
        thought, answer = split_thought(message)
        if thought:
            safe |= {"thought": self.hide(thought), "content": self.hide(thought) + answer}
        return safe


def reveal(text: str) -> str:
    return _HIDDEN_TEXT.sub(lambda found: chr(ord(found.group()) - _HIDDEN), text)


def _hidden(text: str) -> str:
    return "".join(chr(_HIDDEN + ord(character)) for character in text)
