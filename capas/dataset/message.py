"""Check a source's message, and convert it to the form of `capas.core.records.RAW`.

Contents are kept as they are, including whitespace, control characters and NUL. A content that is a list of
text parts becomes one text. `extra` has the keys besides role and content that templates may use: tool_calls
(arguments given as JSON text become the object), tool_call_id, name (of a tool's message), reasoning_content.
The keys of a call keep their order, because the model is trained on it.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from capas.core.records import TEXT
from capas.dataset.calls import check_calls
from capas.dataset.flaws import (
    EMPTY_ANSWER,
    EMPTY_QUESTION,
    INVALID_TEXT,
    KEEP,
    MALFORMED,
    NOT_TEXT,
    REPLACE,
    UNCLEAR_TRAINING,
    UNKNOWN_ROLE,
    Flaw,
    Flaws,
)
from capas.dataset.names import CALLS, ROLES, THOUGHTS, TRAINED, UNCLEAR, UNTRAINED, role_of

_BY_ROLE = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("name", "tool_call_id")}
_TRAINING = (*TRAINED, *UNTRAINED, *UNCLEAR)
_READ = ("role", "content", "parts", *_TRAINING, *THOUGHTS, *CALLS)
_SURROGATE = re.compile("[\ud800-\udfff]")
Message = dict[str, Any]


class OfColumn(dict[str, Any]):
    """A message built from columns; its flaws are reported there, since the source has no such message.

    Args:
        column: the place of the content.
        at: the place of the other keys, None if they are columns of their own.
    """

    def __init__(
        self,
        role: Any,
        content: Any,
        column: str,
        others: Mapping[str, Any] | None = None,
        at: str | None = None,
    ) -> None:
        super().__init__(others or {}, role=role, content=content)
        self.column, self.at = column, at

    def place(self, key: str) -> str:
        if key == "content":
            return self.column
        return key if self.at is None else f"{self.at}.{'from' if key == 'role' else key}"


def check_message(message: Any, at: str, flaws: Flaws, roles: Mapping[str, str]) -> Message:
    """Return a message as {role, content, extra, train}.

    Args:
        at: its place in the record, messages[3].
        roles: `dataset.roles`, further names of roles.

    Raises:
        Flaw: the message is flawed, and the policy for that flaw is not a repair.
    """
    if not isinstance(message, Mapping):
        raise Flaw(MALFORMED, at, message, "give an object with role and content")
    role = _role(message, at, roles)
    extra = _extra(role, message, at, flaws)
    content, where = _content(message, at, flaws)
    if content is None and (role in ("assistant", TEXT) or _is_cell(message)):
        content = ""
    if not isinstance(content, str):
        inside = next(iter(content), None) if isinstance(content, Mapping) else None
        key = f", or name a key in it: {where}.{inside}" if inside and _is_cell(message) else ""
        raise Flaw(NOT_TEXT, where, content, f"give it as text{key}")
    if role in ("assistant", TEXT) and not content.strip() and "tool_calls" not in extra:
        advice = (
            "an empty answer would train the model to say nothing; remove the turn or the record"
        )
        raise Flaw(EMPTY_ANSWER, where, message.get("content"), advice)
    if role == "user" and not content.strip() and _is_cell(message):
        flaws.allows(Flaw(EMPTY_QUESTION, where, message["content"], "the prompt is empty"), KEEP)
    return {
        "role": role,
        "content": clean(content, where, flaws),
        "extra": json_text(extra, at, flaws) if extra else "",
        "train": _trained(role, message, at),
    }


def place_of(message: Mapping[str, Any], key: str, at: str) -> str:
    return message.place(key) if isinstance(message, OfColumn) else f"{at}.{key}"


def _role(message: Mapping[str, Any], at: str, roles: Mapping[str, str]) -> str:
    given = message.get("role")
    role = TEXT if given == TEXT else role_of(given, roles)
    if role not in (*ROLES, TEXT):
        advice = f"known roles: {', '.join(ROLES)}, plus the names mapped in dataset.roles"
        raise Flaw(UNKNOWN_ROLE, place_of(message, "role", at), given, advice)
    return role


def _is_cell(message: Mapping[str, Any]) -> bool:
    """Return whether the message is a column of its own."""
    return isinstance(message, OfColumn) and message.at is None


def _content(message: Mapping[str, Any], at: str, flaws: Flaws) -> tuple[Any, str]:
    """Return the content, with a list of text parts joined to one text, and its place."""
    key = "parts" if "parts" in message and message.get("content") is None else "content"
    content, where = message.get(key), place_of(message, key, at)
    if isinstance(content, list) and not _is_cell(message):
        content = "".join([_part(part, f"{where}[{i}]", flaws) for i, part in enumerate(content)])
    return content, where


def _part(part: Any, at: str, flaws: Flaws) -> str:
    """Return the text of a part: {type: text, text: ...} (OpenAI, Anthropic), {text: ...} (Gemini), or text.

    Raises:
        Flaw: the part is not text.
    """
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text"):
        advice = "capas trains on text only; remove this part or the record"
        raise Flaw(NOT_TEXT, at, part if kind is None else f"a part of the type {kind}", advice)
    if not isinstance(part.get("text"), str):
        raise Flaw(NOT_TEXT, f"{at}.text", part.get("text"), "give it as text")
    for key in [k for k, v in part.items() if k not in ("type", "text") and v is not None]:
        flaws.leave_out(f"messages[].content[].{key}")
    return str(part["text"])


def _extra(role: str, message: Mapping[str, Any], at: str, flaws: Flaws) -> dict[str, Any]:
    """Return the keys that templates use, in a fixed order; all others are counted.

    Raises:
        Flaw: a role has a key that it may not have, or a value is not text.
    """
    kept = _BY_ROLE.get(role, ())
    for unused in [k for k, v in message.items() if k not in (*_READ, *kept) and v is not None]:
        flaws.leave_out(f"messages[].{unused} ({role})")
    given = dict(message)
    for target, names in (("reasoning_content", THOUGHTS), ("tool_calls", CALLS)):
        if (key := only_key(message, names, at)) is not None:
            where, value = place_of(message, key, at), given.pop(key)
            if role != "assistant":
                raise Flaw(
                    MALFORMED,
                    where,
                    value,
                    f"only assistant messages may have {target}, not {role} messages",
                )
            given[target] = check_calls(value, where) if target == "tool_calls" else value
    extra = {key: given[key] for key in kept if given.get(key) not in (None, [], "")}
    for name in [key for key in extra if key != "tool_calls"]:
        if not isinstance(extra[name], str):
            named = only_key(message, THOUGHTS, at) if name == "reasoning_content" else name
            where = place_of(message, named or name, at)
            raise Flaw(NOT_TEXT, where, extra[name], "give it as text")
    return extra


def only_key(values: Mapping[str, Any], names: tuple[str, ...], at: str) -> str | None:
    """Return the first of these keys with a value, or None.

    Raises:
        Flaw: several have values, and these differ.
    """
    given = [key for key in names if key in values and values[key] not in (None, "", [])]
    if len(given) > 1 and any(values[key] != values[given[0]] for key in given):
        field = ".".join(filter(None, (at, given[1])))
        advice = f"{' and '.join(given)} are synonyms but have different values; keep one of them"
        raise Flaw(MALFORMED, field, values[given[1]], advice)
    return given[0] if given else None


def _trained(role: str, message: Mapping[str, Any], at: str) -> bool:
    """Return whether a message is trained: not with `train: false`, OpenAI's `weight: 0`, `masked: true`, ...

    Raises:
        Flaw: the keys are ambiguous or contradictory, or mark a message that is never trained.
    """
    trained: dict[str, bool] = {}
    for key in [key for key in _TRAINING if message.get(key) is not None]:
        value, where = message[key], place_of(message, key, at)
        if key in UNCLEAR:
            advice = "this key is ambiguous between tools; use train: true or train: false"
            raise Flaw(UNCLEAR_TRAINING, where, value, advice)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            advice = "give true or false (1 or 0): an answer is trained as a whole or not at all"
            raise Flaw(UNCLEAR_TRAINING, where, value, advice)
        trained[key] = bool(value) != (key in UNTRAINED)
        if trained[key] and role not in ("assistant", TEXT):
            advice = f"{role} messages are never trained; remove the key or set it to false"
            raise Flaw(UNCLEAR_TRAINING, where, value, advice)
    if len(set(trained.values())) > 1:
        key = next(key for key in trained if trained[key])
        advice = f"{' and '.join(trained)} contradict each other; keep one of them"
        raise Flaw(UNCLEAR_TRAINING, place_of(message, key, at), message[key], advice)
    return role not in ("assistant", TEXT) or all(trained.values())


def clean(text: str, field: str, flaws: Flaws) -> str:
    """Return a text that UTF-8 can encode, with lone surrogates replaced if the policy allows it.

    Raises:
        Flaw: there are lone surrogates, and the policy is not replace.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = error.start
        byte = ord(text[start]) - 0xDC00
        what = f"byte 0x{byte:02X}" if 0x80 <= byte <= 0xFF else "half of a surrogate pair"
        advice = (
            f"character {start + 1} is {what}, which is not valid UTF-8; save the file as UTF-8"
        )
        shown = text[max(0, start - 20) : start + 20]
        flaws.allows(Flaw(INVALID_TEXT, field, shown, advice), REPLACE)
        return _SURROGATE.sub("\ufffd", text)
    return text


def json_text(value: Any, field: str, flaws: Flaws, sort_keys: bool = False) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=sort_keys, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Flaw(MALFORMED, field, value, f"it is not JSON: {error}") from None
    return clean(text, field, flaws)
