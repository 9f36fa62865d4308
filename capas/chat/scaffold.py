"""What a chat template puts around contents, found by rendering it once per pattern of roles.

The template is rendered with a mark in the place of each content, and the text cut at its control tokens::

    <|im_start|>  user\\n MARK0  <|im_end|>  \\n  <|im_start|>  assistant\\n MARK1  <|im_end|>  \\n

Every segment between two control tokens is encoded by itself, as tokenizers do it. What belongs to an answer
(its `owner`) is what the model has to write: from the end of the generation prompt to the end token.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from tokenizers import AddedToken

from capas.chat.plan import Control, Piece, Plan, Segment
from capas.chat.template import TemplateRefusal
from capas.errors import CapasError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]  # (messages, add_generation_prompt)
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private-use characters that no template writes
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PADDING = " \t\n"


class Planner:
    """Makes plans for one template.

    Args:
        render: the template, the policy for system messages applied.
        controls: the control tokens by their text.

    Raises:
        CapasError: the template ends no answer with a control token, or asks for answers differently.
    """

    def __init__(self, render: Render, controls: Mapping[str, AddedToken]) -> None:
        self._render = render
        self._pattern = control_pattern(controls)
        self._controls = controls
        self.end_token = self._find_end_token()

    def plan(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> Plan:
        """The plan for conversations with these roles.

        Raises:
            CapasError: the template refuses, drops or repeats a message, or leaves an answer open.
        """
        told = _mark(messages)
        texts, order = _cut(self._render(told, add_generation_prompt))
        _check_each_once(order, told)
        pieces = list(self._pieces(texts, order, told))
        padded = self._render(_mark(messages, _PADDING), add_generation_prompt)
        trims = tuple(_find_trim(padded, index) for index in range(len(told)))
        return Plan(tuple(_group(pieces)), trims)

    def _find_end_token(self) -> str:
        question, answer = {"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}
        whole = self._render(_mark([question, answer]), False)
        found = self._pattern.search(_cut(whole)[0][-1])
        if found is None:
            after = _cut(whole)[0][-1]
            raise CapasError(
                f"the chat template writes no control token after an answer (only {after!r}), so the model "
                "would never learn to stop; let it end the assistant's turn with one, e.g. eos_token"
            )
        prompt = self._render(_mark([question]), True)
        if not whole.startswith(prompt):
            raise CapasError(
                "the chat template asks for an answer in another way than it writes one: the text with "
                f"add_generation_prompt, {_readable(prompt)!r}, does not begin the conversation "
                f"{_readable(whole)!r}; the model would be trained on one and asked with the other"
            )
        return self._name(found)

    def _pieces(
        self, texts: Sequence[str], order: Sequence[int], told: Sequence[Mapping[str, Any]]
    ) -> Iterator[Control | Piece]:
        """Scaffold and contents in the order of the text."""
        for place, text in enumerate(texts):
            previous = order[place - 1] if place > 0 else None
            following = order[place] if place < len(order) else None
            end = self._end_of_answer(text, previous, following, told)
            start = max(end, len(text) - len(self._lead(text, following, told)))
            yield from self._scaffold(text[:end], previous)
            yield from self._scaffold(text[end:start], None)
            yield from self._scaffold(text[start:], following)
            if following is not None:
                spoken = told[following]["role"] == "assistant"
                yield Piece("", following, following if spoken else None)

    def _scaffold(self, text: str, owner: int | None) -> Iterator[Control | Piece]:
        position = 0
        for found in self._pattern.finditer(text):
            if found.start() > position:
                yield Piece(text[position : found.start()], None, owner)
            yield Control(found.group(), self._name(found), owner)
            position = found.end()
        if position < len(text):
            yield Piece(text[position:], None, owner)

    def _end_of_answer(
        self,
        text: str,
        previous: int | None,
        following: int | None,
        told: Sequence[Mapping[str, Any]],
    ) -> int:
        """How much of the scaffold after an answer belongs to it: up to and including the end token."""
        if previous is None or told[previous]["role"] != "assistant":
            return 0
        found = self._pattern.search(text)
        if found is not None and self._name(found) == self.end_token:
            return found.end()
        if found is None and following is not None and told[following]["role"] == "assistant":
            return len(text)  # the template makes one turn of two messages
        raise CapasError(
            f"the chat template does not end message {previous} (assistant) with {self.end_token}, as it "
            f"does in a conversation of two messages, but goes on with {_readable(text)!r}"
        )

    def _lead(self, text: str, following: int | None, told: Sequence[Mapping[str, Any]]) -> str:
        """What of the scaffold before an answer the generation prompt lacks: the model has to write it."""
        if not following or told[following]["role"] != "assistant":
            return ""
        try:
            prompt = _cut(self._render(told[:following], True))[0][-1]
        except TemplateRefusal:
            return ""  # nobody can ask for this answer alone
        return text.removeprefix(prompt) if text.startswith(prompt) else ""

    def _name(self, found: re.Match[str]) -> str:
        return found.group() if found.group() in self._controls else found.group().strip()


def control_pattern(controls: Mapping[str, AddedToken]) -> re.Pattern[str]:
    """Finds control tokens in a text, the longest first, with the blanks that they swallow."""
    longest_first = sorted(
        controls.values(), key=lambda token: (-len(token.content), token.content)
    )
    alternatives = [
        (r"\s*" if token.lstrip else "")
        + re.escape(token.content)
        + (r"\s*" if token.rstrip else "")
        for token in longest_first
    ]
    return re.compile("|".join(alternatives) or r"(?!)")


def _mark(messages: Sequence[Mapping[str, Any]], padding: str = "") -> list[dict[str, Any]]:
    """The conversation with marks for contents. Blank contents stay: templates ask whether one is empty."""
    return [
        {
            "role": message["role"],
            "content": f"{padding}{_OPEN}{index}{_CLOSE}{padding}"
            if message["content"].strip()
            else message["content"],
        }
        for index, message in enumerate(messages)
    ]


def _cut(text: str) -> tuple[list[str], list[int]]:
    """The texts between the marks, and the indices of the marks: one less."""
    parts = _MARK.split(text)
    return parts[::2], [int(index) for index in parts[1::2]]


def _check_each_once(order: Sequence[int], told: Sequence[Mapping[str, Any]]) -> None:
    for index, message in enumerate(told):
        count = order.count(index)
        if count != 1 and _MARK.search(message["content"]):
            how = "leaves out" if count == 0 else f"writes {count} times"
            raise CapasError(
                f"the chat template {how} message {index} ({message['role']}); every message must appear "
                "once (chat_template.system=fold keeps system text where a template has no place for it)"
            )


def _find_trim(padded: str, index: int) -> Callable[[str], str]:
    """What the template does to white space at the ends of a content."""
    mark = f"{_OPEN}{index}{_CLOSE}"
    before, found, after = padded.partition(mark)
    if not found:
        return str  # a blank content: part of the scaffold
    left, right = before.endswith(_PADDING), after.startswith(_PADDING)
    if left:
        return str if right else str.rstrip
    return str.lstrip if right else str.strip


def _group(pieces: Sequence[Control | Piece]) -> Iterator[Control | Segment]:
    first = True
    for is_control, group in groupby(pieces, lambda piece: isinstance(piece, Control)):
        if is_control:
            yield from (part for part in group if isinstance(part, Control))
        else:
            yield Segment(tuple(p for p in group if isinstance(p, Piece)), first)
        first = False


def _readable(text: str) -> str:
    return _MARK.sub(lambda found: f"{{content {found.group(1)}}}", text)
