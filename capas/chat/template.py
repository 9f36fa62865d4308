"""Render chat templates, Jinja as transformers documents it, and apply the policy for system messages.

https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2

from capas.chat.copying import copies_contents
from capas.chat.limits import LimitedEnvironment, line_of
from capas.chat.messages import Messages, Tools, spoken
from capas.core.errors import CapasError


class RecordRefusal(CapasError):  # noqa: N818
    """An error for one conversation that cannot be formatted safely; others may be fine."""


class TemplateRefusal(RecordRefusal):
    """An error for a conversation that the template itself refuses (raise_exception) or fails on."""


class Template:
    """A chat template with a tokenizer's named tokens, without access to clock or files, and with limits.

    Args:
        date_string: the date that the template gets as today: `26 Jul 2024` or `2024-07-26`.
        name: the template's name in error messages, a file for example.

    Raises:
        CapasError: the template has a syntax error, or is nested too deeply.
    """

    def __init__(
        self,
        text: str,
        named_tokens: Mapping[str, str],
        date_string: str,
        name: str = "the chat template",
    ) -> None:
        self._environment = LimitedEnvironment()
        self._environment.filters["tojson"] = self._environment.limited("tojson", _to_json)
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = fixed_clock(date_string)
        try:
            tree = self._environment.parse(text)
            copies = copies_contents(tree)
            self._template = self._environment.compiled(tree)
        except jinja2.TemplateSyntaxError as error:
            raise CapasError(f"{name}, line {error.lineno}: {error.message}") from None
        except Exception as error:  # noqa: BLE001  a template nested too deeply may raise anything
            raise CapasError(f"{name} cannot be read: {_in_words(error)}") from None
        self.text, self.copies_contents, self.name = text, copies, name
        self.date_string = date_string
        self._variables = {**named_tokens, "date_string": date_string}

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """Return the conversation as text.

        Raises:
            TemplateRefusal: the template refuses the conversation or fails; the message has the reason and
                the template's line.
        """
        visible = [spoken(message) for message in messages]
        self._environment.begin()
        try:
            return self._template.render(
                messages=visible,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **self._variables,
            )
        except CapasError:
            raise
        except Exception as error:  # noqa: BLE001  the template is somebody else's program
            roles = ", ".join(m["role"] for m in visible) or "none"
            line = line_of(error)
            where = "" if line is None else f", line {line},"
            raise TemplateRefusal(
                f"{self.name}{where} refuses the conversation (roles: {roles}): {_in_words(error)}"
            ) from None


def _in_words(error: Exception) -> str:
    """Return the template's own message, or a description of the error."""
    if isinstance(error, jinja2.TemplateError):
        return str(error)
    if isinstance(error, RecursionError):
        return "it recurses forever or is nested too deeply"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def fixed_clock(date_string: str) -> Callable[[str], str]:
    """Return `strftime_now` for templates, a function that formats the fixed date.

    Raises:
        CapasError: a template calls the function, and `date_string` is not a date.
    """

    def strftime_now(form: str) -> str:
        return parse_date(date_string).strftime(form)

    return strftime_now


def parse_date(text: str) -> datetime:
    """Return the day of `chat_template.date_string`, at midnight.

    Raises:
        CapasError: the text is not a date.
    """
    for form in ("%d %b %Y", "%d %B %Y", "%Y-%m-%d"):
        with suppress(ValueError):
            return datetime.strptime(text, form)
    raise CapasError(
        f"chat_template.date_string={text!r} is not a date. Write it like 26 Jul 2024 or "
        "2024-07-26, so the chat template can format it"
    )


def place_system(messages: Messages, policy: str) -> list[dict[str, Any]]:
    """Return the conversation with the policy for system messages applied.

    Args:
        policy: `template` leaves system messages to the template. `fold` puts the texts of the leading ones
            before the first user message, with a blank line between (for families without a system role).
            `error` refuses them.

    Raises:
        RecordRefusal: with `error`, there is a system message; with `fold`, one comes later than at the
            start, or no user message follows.
    """
    conversation = [dict(message) for message in messages]
    positions = [i for i, m in enumerate(conversation) if m["role"] == "system"]
    if policy == "template" or not positions:
        return conversation
    if policy == "error":
        raise RecordRefusal(
            f"message {positions[0]} has the role system, and chat_template.system=error refuses "
            "it. To keep it, set chat_template.system=template or fold"
        )
    leading = len(positions)
    if positions != list(range(leading)):
        raise RecordRefusal(
            f"message {positions[-1]} has the role system in the middle of the conversation; "
            "chat_template.system=fold only folds system messages before the first user message"
        )
    if leading == len(conversation) or conversation[leading]["role"] != "user":
        raise RecordRefusal(
            "chat_template.system=fold needs a user message right after the system message"
        )
    texts = [m["content"] for m in conversation[: leading + 1]]
    folded = "\n\n".join([text for text in texts[:-1] if text.strip()] + texts[-1:])
    return [{**conversation[leading], "content": folded}, *conversation[leading + 1 :]]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON, without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
