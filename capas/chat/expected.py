"""Encode a rendered conversation whole, as `apply_chat_template` does, to check an assembled one."""

from collections.abc import Iterator
from contextlib import suppress

from capas.chat.format import ChatFormat
from capas.chat.messages import Messages, Tools
from capas.chat.template import TemplateRefusal


def reference_ids(
    chat: ChatFormat, messages: Messages, add_generation_prompt: bool = False, tools: Tools = None
) -> list[int]:
    """Return the ids of the rendered text, encoded whole with control tokens parsed.

    They are those of `apply_chat_template`, with one intended difference: if the last token of a prompt
    would include the beginning of the answer (two line breaks in one token, say), the answer begins with
    a token of its own.
    """
    text = chat.render(messages, add_generation_prompt, tools)
    ids: list[int] = []
    done = 0
    for end in _prompt_ends(chat, messages, text, tools):
        prompt, rest = chat.encode_rendered([text[done:end], text[done:]], done > 0)
        if rest[: len(prompt)] != prompt:
            answer = chat.encode_rendered([text[end:]], True)[0]
            if chat.decode([*prompt, *answer]) == chat.decode(rest):
                ids, done = [*ids, *prompt], end
    return [*ids, *chat.encode_rendered([text[done:]], done > 0)[0]]


def _prompt_ends(chat: ChatFormat, messages: Messages, text: str, tools: Tools) -> Iterator[int]:
    """Yield the positions in a rendered conversation at which an answer's prompt ends."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            with suppress(TemplateRefusal):
                prompt = chat.render(messages[:index], True, tools)
                if text.startswith(prompt):
                    yield len(prompt)
