"""Find out, by rendering short conversations, how a chat template ends answers.

Most templates end every answer with the same control token. Harmony ends the last answer with one token and
earlier answers, like the user's turns, with another. A template of a thinking model may open a thought in the
prompt, or write a control token between a thought and its answer, which must not stop the generation.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from capas.chat.controls import Controls
from capas.chat.messages import Messages, Tools
from capas.chat.placeholders import Placeholders, mark_contents
from capas.chat.template import TemplateRefusal
from capas.core.errors import CapasError

Render = Callable[[Messages, bool, Tools], str]  # (messages, add_generation_prompt, tools)
_QUESTION, _ANSWER = {"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}
_THOUGHT = {"reasoning_content": "-"}


@dataclass(frozen=True)
class EndTokens:
    """The control tokens with which a template ends answers.

    Args:
        every: all of them; the first one ends the last answer of a conversation.
        stops: those that stop a generation.
    """

    every: tuple[str, ...]
    stops: tuple[str, ...]

    @property
    def last(self) -> str:
        return self.every[0]


def find_end_tokens(render: Render, controls: Controls, placeholders: Placeholders) -> EndTokens:
    """Return how a template ends answers.

    Args:
        render: the template, including the policy for system messages.
        placeholders: stand-ins for conversations that contain none of the stand-in characters.

    Raises:
        CapasError: the template ends no answer with a control token, or its prompt is not a prefix of the
            conversation.
    """
    probe = _Probe(render, controls, placeholders)
    end, other = probe.end_token(), probe.other_end_token()
    if other is None:
        return EndTokens((end,), (end,))
    stops = (end,) if other in probe.written_inside() else (end, other)
    return EndTokens((end, other), stops)


class _Probe:
    def __init__(self, render: Render, controls: Controls, placeholders: Placeholders) -> None:
        self._render, self._controls, self._placeholders = render, controls, placeholders
        self._prompt = render(mark_contents([_QUESTION], placeholders), True, None)

    def end_token(self) -> str:
        """Return the control token after an answer.

        Raises:
            CapasError: see `find_end_tokens`.
        """
        whole = self._conversation("-")
        after = self._placeholders.cut(whole)[0][-1]
        found = next(iter(self._controls.names(after)), None)
        if found is None:
            raise CapasError(
                f"the chat template writes no control token after an answer (only {after!r}), so "
                "the model would never learn to stop. End the assistant's turn in the template "
                "with a control token, e.g. eos_token"
            )
        if not whole.startswith(self._prompt) and not self._asks_for_a_thought():
            prompt, whole = map(self._placeholders.readable, (self._prompt, whole))
            raise CapasError(
                "the chat template's prompt is not a prefix of its conversation: with "
                f"add_generation_prompt it renders {prompt!r}, the whole "
                f"conversation is {whole!r}. The model would be trained on one "
                "format and prompted in another"
            )
        return found

    def other_end_token(self) -> str | None:
        """Return the token that ends answers before the last one, if it also ends the user's turns."""
        turns = [_QUESTION, _ANSWER, _QUESTION, _ANSWER]
        try:
            rendered = self._render(mark_contents(turns, self._placeholders), False, None)
        except TemplateRefusal:
            return None  # the family allows one turn only
        texts = self._placeholders.cut(rendered)[0]
        if len(texts) != len(turns) + 1:
            return None
        of_user, of_answer = map(self._controls.names, texts[1:3])
        is_end = len(of_user) > 1 and of_user[:1] == of_answer[:1] != [self.end_token()]
        return of_user[0] if is_end else None

    def written_inside(self) -> set[str]:
        """Return the control tokens between prompt and content if the answer begins with a thought."""
        try:
            whole = self._conversation("-", **_THOUGHT)
        except TemplateRefusal:
            return set()
        before = whole.partition(self._placeholders.mark(1))[0]
        return set(self._controls.names(before.removeprefix(self._prompt)))

    def _asks_for_a_thought(self) -> bool:
        """Return whether the prompt is a prefix if the answer begins with a thought, which it may open."""
        for answer in ({"content": "<think>\n-\n</think>\n\n-"}, {"content": "-", **_THOUGHT}):
            with suppress(TemplateRefusal):
                if self._conversation(**answer).startswith(self._prompt):
                    return True
        return False

    def _conversation(self, content: str, **more: str) -> str:
        """Return a rendered question and answer, with marks for contents."""
        answer = self._placeholders.protect({"role": "assistant", "content": content, **more})
        return self._render(mark_contents([_QUESTION, answer], self._placeholders), False, None)
