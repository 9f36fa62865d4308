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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from capas.dataset.conversation import TEXT
from capas.dataset.flaws import MALFORMED, Flaw
from capas.dataset.rows import Row

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
    return {"role": _SPEAKERS[speaker], "content": turn.get("value"), **rest}


def _json_calls(text: Any, at: str) -> list[Any]:
    try:
        calls = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        advice = f"a function call is JSON, {{name, arguments}}: {error}"
        raise Flaw(MALFORMED, at, text, advice) from None
    return calls if isinstance(calls, list) else [calls]


def _alpaca(row: Found) -> Found:
    asked = _joined([row.pop("instruction"), row.pop("input", "")], "instruction")
    messages = [*_system(row.pop("system", None)), *_history(row.pop("history", None))]
    return _told([*messages, *_pair(asked, row.pop("output"))], row)


def _history(history: Any) -> list[Found]:
    """Earlier turns as pairs [asked, answered]."""
    if history in (None, "", []):
        return []
    if not isinstance(history, list) or any(
        not isinstance(p, list) or len(p) != 2 for p in history
    ):
        raise Flaw(MALFORMED, "history", history, "give a list of pairs [asked, answered]")
    return [message for asked, answered in history for message in _pair(asked, answered)]


def _prompt_completion(row: Found) -> Found:
    prompt, completion = row.pop("prompt"), row.pop("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _told([*prompt, *completion], row)
    return _told(_pair(prompt, completion), row)


def _question_answer(row: Found) -> Found:
    return _told(_pair(row.pop("question"), row.pop("answer")), row)


def _plain(row: Found) -> Found:
    return _told([{"role": TEXT, "content": row.pop("text")}], row)


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


def _pair(asked: Any, answered: Any) -> list[Found]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _system(content: Any) -> list[Found]:
    return [] if content in (None, "") else [{"role": "system", "content": content}]


def _joined(parts: list[Any], field: str) -> Any:
    """Texts with a blank line between them, empty ones left out; what is no text is left to be refused."""
    given = [part for part in parts if part not in (None, "")]
    if not given:
        raise Flaw(MALFORMED, field, parts[0], "nothing is asked")
    wrong = [part for part in given if not isinstance(part, str)]
    return wrong[0] if wrong else "\n\n".join(given)


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
    found |= {key: cells[key][0] for key in ("id", "tools") if key in cells}
    if "id" not in columns and "id" in row:
        found["id"] = row["id"]
    system = _system("\n\n".join(map(str, filter(None, cells.get("system", [])))))
    if "messages" in columns:
        return {
            **found,
            "messages": [*system, *_listed(cells["messages"][0], str(columns["messages"]))],
        }
    if "text" in columns:
        return {**found, "messages": [{"role": TEXT, "content": _joined(cells["text"], "text")}]}
    asked = _joined(cells["user"], " + ".join(_names(columns["user"])))
    answered = (
        cells["assistant"][0]
        if len(cells["assistant"]) == 1
        else _joined(cells["assistant"], "assistant")
    )
    return {**found, "messages": [*system, *_pair(asked, answered)]}


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


def threads(rows: Iterable[Row]) -> Iterator[Row]:
    """One conversation for each tree of Open Assistant: from its root along the best ranked replies.

    It ends with the last answer. The trees are put together in memory: their rows stand in no order.
    """
    children: dict[Any, list[tuple[Row, Mapping[str, Any]]]] = {}
    broken: list[Row] = []
    known: set[str] = set()
    for row in rows:
        value = row.value
        if not isinstance(value, Mapping) or not isinstance(value.get("message_id"), str):
            broken.append(row)
            continue
        known.add(value["message_id"])
        if not value.get("deleted"):  # what hangs below a deleted message goes with it
            children.setdefault(value.get("parent_id"), []).append((row, value))
    yield from broken
    for parent in [p for p in children if p is not None and p not in known]:
        for row, value in children[parent]:
            advice = "no row has this message_id"
            yield replace(row, value=Flaw(MALFORMED, "parent_id", value["parent_id"], advice))
    for row, root in children.get(None, []):
        yield replace(
            row, value={"id": root["message_id"], "messages": _best_thread(root, children)}
        )


def _best_thread(root: Mapping[str, Any], children: Mapping[Any, Any]) -> list[Found]:
    told, current = [], root
    while True:
        role = "user" if current.get("role") == "prompter" else current.get("role")
        told.append({"role": role, "content": current.get("text")})
        replies = [value for _, value in children.get(str(current["message_id"]), [])]
        if not replies:
            break
        current = min(replies, key=_rank)
    answers = [i for i, message in enumerate(told) if message["role"] == "assistant"]
    return told[: answers[-1] + 1] if answers else told


def _rank(reply: Mapping[str, Any]) -> tuple[bool, float]:
    """0 is the best; replies without a rank come last, in the order of the file."""
    rank = reply.get("rank")
    return (rank is None, rank or 0)
