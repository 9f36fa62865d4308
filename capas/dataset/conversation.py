"""A conversation as a source gives it, checked and put into the form of `capas.records.RAW`.

Contents are kept as they are: white space, control characters and NUL included. What templates may use of a
message beside role and content goes into `extra`: tool_calls (arguments given as JSON text become the object
itself), tool_call_id, name (of a tool's message), reasoning_content. The keys of a call keep their
order: it is what a model is trained on.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from capas.dataset.calls import check_calls
from capas.dataset.flaws import (
    CONSECUTIVE,
    EMPTY_ANSWER,
    INVALID_TEXT,
    KEEP,
    MALFORMED,
    MERGE,
    NO_ANSWER,
    REPLACE,
    SYSTEM,
    Flaw,
    Flaws,
)
from capas.records import Record

ROLES = ("system", "user", "assistant", "tool")
TEXT = "text"  # the one role of a record that is plain text, all of it trained
_KEPT = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("name", "tool_call_id")}
_PLAIN = ("role", "content", "train", "weight")
_SURROGATE = re.compile("[\ud800-\udfff]")
Message = dict[str, Any]


def check_record(found: Mapping[str, Any], flaws: Flaws) -> Record:
    """The record of `RAW`; its id is "" where it has none of its own.

    Args:
        found: messages, and id, tools, metadata where there are any; other keys are counted and left out.

    Raises:
        Flaw: it is not as it must be, and the policy of that flaw is no repair.
    """
    for key, value in found.items():
        if key not in ("id", "messages", "tools", "metadata") and value is not None:
            flaws.leave_out(str(key))
    return {
        "id": _identity(found.get("id"), flaws),
        "messages": check_messages(found.get("messages"), flaws),
        "tools": _tools(found.get("tools"), flaws),
        "metadata": _metadata(found.get("metadata"), flaws),
    }


def check_messages(messages: Any, flaws: Flaws) -> list[Message]:
    if isinstance(messages, str):
        advice = "it is a text; give the list itself, not its JSON inside a string (json.loads it once more)"
        raise Flaw(MALFORMED, "messages", messages, advice)
    if not isinstance(messages, list) or not messages:
        raise Flaw(MALFORMED, "messages", messages, "give a list of {role, content}")
    checked = [_message(message, f"messages[{i}]", flaws) for i, message in enumerate(messages)]
    if checked[0]["role"] == TEXT:
        return _plain_text(checked)
    checked = _alternating(checked, flaws)
    for i, message in enumerate(checked):
        _check_order(i, message, checked, flaws)
    if not any(m["role"] == "assistant" and m["train"] for m in checked):
        last = checked[-1]["role"]
        raise Flaw(NO_ANSWER, "messages[-1].role", last, "no answer of the assistant to train on")
    return checked


def _message(message: Any, at: str, flaws: Flaws) -> Message:
    if not isinstance(message, Mapping):
        raise Flaw(MALFORMED, at, message, "give an object with role and content")
    role = message.get("role")
    if role not in (*ROLES, TEXT):
        raise Flaw(MALFORMED, f"{at}.role", role, f"known roles: {', '.join(ROLES)}")
    extra = _extra(role, message, at, flaws)
    content, where = message.get("content"), getattr(message, "column", f"{at}.content")
    if content is None and "tool_calls" in extra:
        content = ""
    if not isinstance(content, str):
        raise Flaw(MALFORMED, where, content, "give it as text")
    if role in ("assistant", TEXT) and not content.strip() and "tool_calls" not in extra:
        advice = (
            "an empty answer would teach the model to say nothing; leave the turn or the record out"
        )
        raise Flaw(EMPTY_ANSWER, where, content, advice)
    return {
        "role": role,
        "content": clean(content, where, flaws),
        "extra": _json_text(extra, f"{at}", flaws) if extra else "",
        "train": _trained(message, at),
    }


def _extra(role: str, message: Mapping[str, Any], at: str, flaws: Flaws) -> dict[str, Any]:
    """The keys that templates use, in a fixed order; all others are counted."""
    kept = _KEPT.get(role, ())
    for key in [k for k, v in message.items() if k not in (*_PLAIN, *kept) and v is not None]:
        flaws.leave_out(f"messages[].{key} ({role})")
    extra = {key: message[key] for key in kept if message.get(key) not in (None, [])}
    for key, value in extra.items():
        if key == "tool_calls":
            extra[key] = check_calls(value, f"{at}.tool_calls")
        elif not isinstance(value, str):
            raise Flaw(MALFORMED, f"{at}.{key}", value, "give it as text")
    return extra


def _trained(message: Mapping[str, Any], at: str) -> bool:
    """`train: false` or, as OpenAI writes it, `weight: 0` keep an answer out of the loss."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise Flaw(MALFORMED, f"{at}.train", train, "give true or false")
    if weight is not None and weight not in (0, 1):
        raise Flaw(MALFORMED, f"{at}.weight", weight, "a message's weight is 0 or 1")
    return train is not False and weight != 0


def _plain_text(checked: list[Message]) -> list[Message]:
    if len(checked) > 1:
        raise Flaw(
            MALFORMED, "messages", checked[1]["role"], "a plain text stands alone in its record"
        )
    return checked


def _alternating(messages: list[Message], flaws: Flaws) -> list[Message]:
    """Two messages of one role in a row: only the results of several tool calls may stand so."""
    told: list[Message] = []
    for i, message in enumerate(messages):
        if not told or told[-1]["role"] != message["role"] or message["role"] == "tool":
            told.append(message)
            continue
        flaw = Flaw(
            CONSECUTIVE,
            f"messages[{i}].role",
            message["role"],
            "the message before has the same role",
        )
        flaws.allows(flaw, MERGE, KEEP)
        if flaws.policy(CONSECUTIVE) == KEEP:
            told.append(message)
        else:
            told[-1] = _merged(told[-1], message, i)
    return told


def _merged(first: Message, second: Message, number: int) -> Message:
    if first["extra"] or second["extra"] or first["train"] != second["train"]:
        advice = "cannot be merged with the message before: tool calls, or trained and not trained"
        raise Flaw(MALFORMED, f"messages[{number}]", second["content"], advice)
    return {**first, "content": f"{first['content']}\n\n{second['content']}"}


def _check_order(number: int, message: Message, messages: list[Message], flaws: Flaws) -> None:
    before = messages[:number]
    if message["role"] == "system" and any(m["role"] != "system" for m in before):
        advice = "a system message stands first; models know it in no other place"
        flaws.allows(Flaw(SYSTEM, f"messages[{number}].role", "system", advice), KEEP)
    if message["role"] == "tool":
        asked = next((m for m in reversed(before) if m["role"] != "tool"), None)
        if asked is None or '"tool_calls"' not in asked["extra"]:
            advice = "a tool's message follows the tool_calls of an assistant"
            raise Flaw(MALFORMED, f"messages[{number}].role", "tool", advice)
    if message["role"] == TEXT:
        raise Flaw(MALFORMED, f"messages[{number}].role", TEXT, f"known roles: {', '.join(ROLES)}")


def clean(text: str, field: str, flaws: Flaws) -> str:
    """The text, which UTF-8 can hold."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = error.start
        byte = ord(text[start]) - 0xDC00
        what = f"byte 0x{byte:02X}" if 0x80 <= byte <= 0xFF else "half of a surrogate pair"
        advice = f"character {start + 1} is {what}: no UTF-8; repair it, or save the file as UTF-8"
        shown = text[max(0, start - 20) : start + 20]
        flaws.allows(Flaw(INVALID_TEXT, field, shown, advice), REPLACE)
        return _SURROGATE.sub("\ufffd", text)
    return text


def _identity(identity: Any, flaws: Flaws) -> str:
    """A text or an integer; anything else is no id."""
    if isinstance(identity, str | int) and not isinstance(identity, bool):
        return clean(str(identity), "id", flaws)
    if identity is not None:
        flaws.leave_out("id")
    return ""


def _tools(tools: Any, flaws: Flaws) -> str:
    """A list of functions, or its JSON as text; as JSON text, its keys in their order."""
    if tools in (None, "", []):
        return ""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise Flaw(
                MALFORMED, "tools", tools, f"tools given as text must be JSON: {error}"
            ) from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Flaw(MALFORMED, "tools", tools, "give a list of objects")
    return _json_text(tools, "tools", flaws) if tools else ""


def _metadata(metadata: Any, flaws: Flaws) -> str:
    if metadata is not None and not isinstance(metadata, Mapping):
        flaws.leave_out("metadata")
        return "{}"
    return _json_text(metadata or {}, "metadata", flaws, sort_keys=True)


def _json_text(value: Any, field: str, flaws: Flaws, sort_keys: bool = False) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=sort_keys, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Flaw(MALFORMED, field, value, f"it is not JSON: {error}") from None
    return clean(text, field, flaws)
