"""Chat templates: Jinja, rendered as transformers documents it, and what becomes of system messages.

https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from capas.chat.copying import copies_contents
from capas.chat.messages import Messages, Tools, spoken
from capas.errors import CapasError


class RecordRefusal(CapasError):  # noqa: N818
    """A conversation that this template cannot show, or not safely; others it may."""


class TemplateRefusal(RecordRefusal):
    """The template itself refuses a conversation (raise_exception), or fails on it."""


class Template:
    """A chat template with a tokenizer's named tokens; it sees neither clock nor files."""

    def __init__(self, text: str, named_tokens: Mapping[str, str], date_string: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda _format: date_string
        try:
            tree = environment.parse(text)
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise CapasError(f"the chat template, line {error.lineno}: {error.message}") from None
        self.text, self.copies_contents = text, copies_contents(tree)
        self._variables = {**named_tokens, "date_string": date_string}

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """The conversation as text.

        Raises:
            TemplateRefusal: with the template's own message.
        """
        told = [spoken(message) for message in messages]
        try:
            return self._template.render(
                messages=told,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, LookupError) as error:
            roles = ", ".join(m["role"] for m in told) or "none"
            raise TemplateRefusal(
                f"the chat template refuses the conversation (roles: {roles}): {error}"
            ) from None


def place_system(messages: Messages, policy: str) -> list[dict[str, Any]]:
    """What the template gets to see of system messages.

    Args:
        policy: `template` leaves them to the template; `fold` puts the text of those that come first, a blank
            line after it, before the first user turn (for families without a system role); `error` refuses.

    Raises:
        RecordRefusal: `error` and there is one; `fold` and no user turn follows, or one stands further on.
    """
    told = [dict(message) for message in messages]
    positions = [i for i, m in enumerate(told) if m["role"] == "system"]
    if policy == "template" or not positions:
        return told
    if policy == "error":
        raise RecordRefusal(
            f"message {positions[0]} has the role system, and chat_template.system is error; "
            "chat_template.system=template or fold would keep it"
        )
    leading = len(positions)
    if positions != list(range(leading)):
        raise RecordRefusal(
            f"message {positions[-1]} has the role system in the middle of the conversation, and "
            "chat_template.system=fold folds only what comes before the first user turn"
        )
    if leading == len(told) or told[leading]["role"] != "user":
        raise RecordRefusal(
            "chat_template.system=fold finds no user turn after the system message to fold it into"
        )
    texts = [m["content"] for m in told[: leading + 1]]
    folded = "\n\n".join([text for text in texts[:-1] if text.strip()] + texts[-1:])
    return [{**told[leading], "content": folded}, *told[leading + 1 :]]


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for other tools; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  as Jinja's extensions declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
