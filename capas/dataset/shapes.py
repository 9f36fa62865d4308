"""The shapes that records of the world have, and the conversation in each of them::

    messages           {"messages": [{"role": "user", "content": "Hi"}, ...], "tools": [...]}     OpenAI
    sharegpt           {"conversations": [{"from": "human", "value": "Hi"}, ...], "system": "..."}
    alpaca             {"instruction": "...", "input": "...", "output": "..."}, with history and system too
    prompt_completion  {"prompt": "...", "completion": "..."}: two texts, or two lists of messages
    question_answer    {"question": "...", "answer": "..."}
    text               {"text": "..."}: all of it is trained
    oasst              one row for each message of a tree: message_id, parent_id, role, text, rank
    columns            whatever `dataset.columns` maps

All rows of oasst are held in memory until the trees are put together; no other shape holds any.
"""

import json
from collections.abc import Mapping
from typing import Any

from capas.dataset.conversation import TEXT
from capas.dataset.flaws import MALFORMED, Flaw

Found = dict[str, Any]
Columns = Mapping[str, str | list[str]]
# The columns by which a shape is recognised, the most specific first.
SIGNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "oasst": ("message_id", "role", "text"),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
_WANTED = {shape: frozenset(columns) for shape, columns in SIGNS.items()}
# As https://github.com/hiyouga/LLaMA-Factory reads them, and the names of the first ShareGPT dumps.
_SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"},
    **{"tool": "tool", "observation": "tool", "function_call": "function_call"},
}


class OfColumn(dict[str, Any]):
    """A message whose content stood elsewhere: a flaw is shown there, not in a message that nobody wrote."""

    def __init__(
        self, role: str, content: Any, column: str, others: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(others or {}, role=role, content=content)
        self.column = column


def recognise(value: Mapping[str, Any]) -> str:
    """Raises Flaw where the columns are those of no known shape."""
    for shape, wanted in _WANTED.items():
        if wanted <= value.keys():
            return shape
    known = "; ".join(f"{shape}: {', '.join(columns)}" for shape, columns in SIGNS.items())
    advice = (
        f"no known shape has these columns ({known}); name yours in dataset.columns, as "
        "{user: pregunta, assistant: respuesta}, with dataset.shape=columns"
    )
    raise Flaw(MALFORMED, "columns", sorted(map(str, value)), advice)


def convert(value: Any, shape: str, columns: Columns) -> Found:
    """The messages of a row, its id, tools and metadata, not yet checked, and the columns that are not used.

    Raises:
        Flaw: the row does not have that shape.
    """
    if isinstance(value, Flaw):
        raise value
    if not isinstance(value, Mapping):
        raise Flaw(MALFORMED, "record", value, "give an object with the columns of a record")
    shape = recognise(value) if shape == "auto" else shape
    if shape == "columns":
        return _mapped(value, columns)
    missing = [column for column in SIGNS[shape] if column not in value]
    if missing:
        advice = f"missing; the shape {shape} has the columns {', '.join(SIGNS[shape])}"
        raise Flaw(MALFORMED, missing[0], sorted(map(str, value)), advice)
    return _CONVERTERS[shape](dict(value))


def _told(messages: list[Any], rest: Found) -> Found:
    return {**rest, "messages": messages}


def _messages(row: Found) -> Found:
    messages = row["messages"]
    return {
        **row,
        "messages": _listed(messages, "messages") if isinstance(messages, list) else messages,
    }


def _sharegpt(row: Found) -> Found:
    turns, system = row.pop("conversations"), row.pop("system", None)
    return _told([*_system(system), *_listed(turns, "conversations")], row)


def _turn(turn: Any, at: str) -> Found:
    if not isinstance(turn, Mapping):
        raise Flaw(MALFORMED, at, turn, "give an object with from and value")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise Flaw(MALFORMED, f"{at}.from", speaker, f"known: {', '.join(_SPEAKERS)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if _SPEAKERS[speaker] == "function_call":
        calls = _json_calls(turn.get("value"), f"{at}.value")
        return {"role": "assistant", "content": "", "tool_calls": calls, **rest}
    for key in ("role", "content"):  # from and value say it; these are counted as left out
        if key in rest:
            rest[f"{key} beside from and value"] = rest.pop(key)
    return OfColumn(_SPEAKERS[speaker], turn.get("value"), f"{at}.value", rest)


def _json_calls(text: Any, at: str) -> list[Any]:
    try:
        calls = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        advice = f"a function call is JSON, {{name, arguments}}: {error}"
        raise Flaw(MALFORMED, at, text, advice) from None
    return calls if isinstance(calls, list) else [calls]


def _alpaca(row: Found) -> Found:
    asked = _asked([row.pop("instruction"), row.pop("input", "")], "instruction")
    messages = [*_system(row.pop("system", None)), *_history(row.pop("history", None))]
    answer = OfColumn("assistant", row.pop("output"), "output")
    return _told([*messages, OfColumn("user", asked, "instruction"), answer], row)


def _history(history: Any) -> list[Found]:
    """Earlier turns as pairs [asked, answered]."""
    if history in (None, "", []):
        return []
    if not isinstance(history, list) or any(
        not isinstance(p, list) or len(p) != 2 for p in history
    ):
        raise Flaw(MALFORMED, "history", history, "give a list of pairs [asked, answered]")
    return [
        OfColumn(role, content, f"history[{i}]")
        for i, pair in enumerate(history)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _prompt_completion(row: Found) -> Found:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _told([*row.pop("prompt"), *row.pop("completion")], row)
    return _told(_pair(row, "prompt", "completion"), row)


def _question_answer(row: Found) -> Found:
    return _told(_pair(row, "question", "answer"), row)


def _plain(row: Found) -> Found:
    return _told([OfColumn(TEXT, row.pop("text"), "text")], row)


def _oasst(row: Found) -> Found:
    raise Flaw(MALFORMED, "columns", sorted(row), "rows of trees: set dataset.shape=oasst")


_CONVERTERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "text": _plain,
    "oasst": _oasst,
}


def _pair(row: Found, asked: str, answered: str) -> list[Found]:
    told = (("user", asked), ("assistant", answered))
    return [OfColumn(role, row.pop(column), column) for role, column in told]


def _system(content: Any, column: str = "system") -> list[Found]:
    return [] if content in (None, "") else [OfColumn("system", content, column)]


def _asked(parts: list[Any], field: str) -> Any:
    if all(part in (None, "") for part in parts):
        raise Flaw(MALFORMED, field, parts[0], "nothing is asked")
    return _joined(parts)


def _joined(parts: list[Any]) -> Any:
    """Texts with a blank line between them, empty ones left out; what is no text is left to be refused."""
    given = [part for part in parts if part not in (None, "")]
    wrong = [part for part in given if not isinstance(part, str)]
    if not given:
        return "" if "" in parts else None
    return (wrong or ["\n\n".join(given)])[0]


def _mapped(row: Mapping[str, Any], columns: Columns) -> Found:
    """By `dataset.columns`; several columns of one role are joined by blank lines."""
    used = {name for names in columns.values() for name in _names(names)}
    rest = {
        k: v for k, v in row.items() if k not in used and k not in {n.split(".")[0] for n in used}
    }
    found: Found = {
        k: v for k, v in rest.items() if k not in ("id", "messages", "tools", "metadata")
    }
    cells = {role: [_cell(row, name) for name in _names(names)] for role, names in columns.items()}
    named = {role: " + ".join(_names(names)) for role, names in columns.items()}
    found |= {key: cells[key][0] for key in ("id", "tools") if key in cells}
    if "id" not in columns and "id" in row:
        found["id"] = row["id"]
    system = "\n\n".join(map(str, filter(None, cells.pop("system", []))))
    messages = _system(system, named.get("system", ""))
    if "messages" in columns:
        messages += _listed(cells["messages"][0], named["messages"])
    if "user" in columns:
        messages.append(OfColumn("user", _asked(cells["user"], named["user"]), named["user"]))
    for role in (TEXT, "assistant"):
        if role in columns:
            messages.append(OfColumn(role, _joined(cells[role]), named[role]))
    return {**found, "messages": messages}


def _listed(messages: Any, column: str) -> list[Any]:
    """A column of messages, as OpenAI or as ShareGPT writes them."""
    if not isinstance(messages, list):
        advice = "give a list of messages, not its JSON inside a string"
        raise Flaw(MALFORMED, column, messages, advice)
    if not (messages and isinstance(messages[0], Mapping) and "from" in messages[0]):
        return messages
    return [_turn(turn, f"{column}[{i}]") for i, turn in enumerate(messages)]


def _names(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _cell(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column; 'inputs.question' is the key question of the column inputs."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            advice = f"there is no such column (dataset.columns names {name})"
            raise Flaw(MALFORMED, "columns", sorted(map(str, row)), advice)
        value = value[part]
    return value
