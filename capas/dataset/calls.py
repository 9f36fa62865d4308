"""Check tool calls and tools, read under the names in use, and convert them to OpenAI's form."""

import json
from collections.abc import Mapping
from typing import Any

from capas.dataset.flaws import BAD_CALL, Flaw
from capas.dataset.names import ARGUMENTS, FUNCTIONS

_BESIDE = ("id", "type", "index", "call_id", "tool_call_id")  # keys of a call, not of its function
_FORM = "give {type, function: {name, arguments}}"


def check_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Return the calls as {type, function: {name, arguments}}, with their other keys kept.

    Args:
        calls: a list of calls or a single one, or their JSON as text.

    Raises:
        Flaw: a call has no name, or its arguments cannot be found.
    """
    calls = _parsed(calls, at, "calls") if isinstance(calls, str) else calls
    if isinstance(calls, Mapping):
        return [_call(calls, at)]
    if not isinstance(calls, list):
        raise Flaw(BAD_CALL, at, calls, "give a list of {type, function: {name, arguments}}")
    return [_call(call, f"{at}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, at: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise Flaw(BAD_CALL, at, call, _FORM)
    given = {key: value for key, value in call.items() if value is not None}
    inner = given.get("function")
    if isinstance(inner, Mapping):
        function = {key: value for key, value in inner.items() if value is not None}
        arguments = {key: given.pop(key) for key in ARGUMENTS if key in given}
        others = [key for key in given if key not in ("function", *_BESIDE)]
        function = _function({**function, **_added(function, arguments, at)}, others, call, at)
        return {key: function if key == "function" else value for key, value in given.items()}
    if isinstance(inner, str):
        given = {"name" if key == "function" else key: value for key, value in given.items()}
    kind = {"tool_use": "function", None: "function"}.get(given.get("type"), given.get("type"))
    beside = {key: given.pop(key) for key in _BESIDE if key in given}
    return {**beside, "type": kind, "function": _function(given, [], call, at)}


def _added(function: Mapping[str, Any], arguments: dict[str, Any], at: str) -> dict[str, Any]:
    """Return the arguments given next to the function instead of inside it.

    Raises:
        Flaw: the function has the same key.
    """
    for key in arguments:
        if key in function:
            raise Flaw(BAD_CALL, f"{at}.{key}", arguments[key], f"{at}.function has {key}, too")
    return arguments


def _function(function: Mapping[str, Any], beside: list[str], call: Any, at: str) -> dict[str, Any]:
    """Return the function with its name and arguments under the keys `name` and `arguments`, order kept.

    Raises:
        Flaw: the function has no name, or its arguments cannot be found.
    """
    named = next((key for key in FUNCTIONS if key in function), "name")
    name = function.get(named)
    if not isinstance(name, str) or not name:
        raise Flaw(BAD_CALL, at, call, f"the function has no name; {_FORM}")
    given = [key for key in ARGUMENTS if key in function]
    if len(given) > 1:
        advice = f"the call has its arguments more than once: {', '.join(given)}. Keep one of them"
        raise Flaw(BAD_CALL, at, call, advice)
    others = [*(str(key) for key in function if key not in (named, *given)), *beside]
    if not given and others:
        advice = (
            f"the call has no arguments; besides its name it has {', '.join(others)}. Name the key "
            f"arguments ({', '.join(ARGUMENTS[1:])} are accepted too); use {{}} for a call without "
            "arguments"
        )
        raise Flaw(BAD_CALL, at, call, advice)
    renamed = {named: "name", **dict.fromkeys(given, "arguments")}
    found = {renamed.get(key, key): value for key, value in function.items()}
    where = f"{at}.function" if isinstance(call.get("function"), Mapping) else at
    arguments = _arguments(found["arguments"], f"{where}.{given[0]}") if given else {}
    return {**found, "arguments": arguments}


def _arguments(arguments: Any, at: str) -> Mapping[str, Any]:
    given = arguments
    if isinstance(arguments, str):
        arguments = _parsed(arguments, at, "arguments")
    if not isinstance(arguments, Mapping):
        raise Flaw(BAD_CALL, at, given, "give an object {name: value}")
    return arguments


def check_tools(tools: Any, at: str) -> list[Mapping[str, Any]]:
    """Return the list of tools, empty if there are none; functions of OpenAI's first form are wrapped.

    Args:
        at: the key of the list. Under `functions`, each function becomes {type: function, function: ...}.

    Raises:
        Flaw: the value is neither a list of objects nor the JSON of one.
    """
    given = tools
    if isinstance(tools, str):
        tools = _parsed(tools, at, "tools") if tools.strip() else []
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Flaw(BAD_CALL, at, given, "give a list of objects")
    if at == "functions":
        return [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return tools


def _parsed(text: str, at: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        advice = f"{what} given as text must be JSON: {error}"
        raise Flaw(BAD_CALL, at, text, advice) from None
