"""Tool calls as OpenAI writes them, checked."""

import json
from collections.abc import Mapping
from typing import Any

from capas.dataset.flaws import MALFORMED, Flaw


def check_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise Flaw(MALFORMED, at, calls, "give a list of {type, function: {name, arguments}}")
    return [_call(call, f"{at}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, at: str) -> dict[str, Any]:
    wrapped = {"type": "function", "function": call} if _is_function(call) else call
    function = wrapped.get("function") if isinstance(wrapped, Mapping) else None
    if not isinstance(function, Mapping) or not _is_function(function):
        raise Flaw(MALFORMED, at, call, "give {type, function: {name, arguments}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            advice = f"arguments given as text must be JSON: {error}"
            raise Flaw(MALFORMED, f"{at}.function.arguments", arguments, advice) from None
    if not isinstance(arguments, Mapping):
        raise Flaw(MALFORMED, f"{at}.function.arguments", arguments, "give an object {name: value}")
    return {**wrapped, "function": {**function, "arguments": arguments}}


def _is_function(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str) and bool(value["name"])
