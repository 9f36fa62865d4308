"""What a chat template puts around contents, found by rendering it once per pattern of roles.

The template is rendered with a mark in the place of each content, and the text cut at its control tokens::

    <|im_start|>  user\\n MARK0  <|im_end|>  \\n  <|im_start|>  assistant\\n MARK1  <|im_end|>  \\n

Every segment between two control tokens is encoded by itself, as tokenizers do it. What belongs to an answer
(its `owner`) is what the model has to write: from the end of the generation prompt to the end token.
Where an answer calls tools, a mark stands in the name of the first one too: the text around it is the answer.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from tokenizers import AddedToken

from capas.chat.messages import Message, Messages, Tools, reveal
from capas.chat.plan import NO_TRIM, Control, Piece, Plan, Segment, Trim
from capas.chat.template import RecordRefusal, TemplateRefusal
from capas.errors import CapasError

Render = Callable[[Messages, bool, Tools], str]  # (messages, add_generation_prompt, tools)
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private-use characters that no template writes
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PADDING, _LINES = " \t\n", "\n" * 5  # more line breaks than a scaffold has of its own


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
        self._tools: Tools = None
        self.end_token = self._find_end_token()

    def plan(self, messages: Messages, add_generation_prompt: bool, tools: Tools = None) -> Plan:
        """The plan for conversations with these roles and, where they have any, these tools and calls.

        Raises:
            CapasError: the template refuses, drops or repeats a message, or leaves an answer open.
        """
        self._tools = tools
        told = _mark(messages)
        texts, order = _cut(self._render(told, add_generation_prompt, tools))
        _check_each_once(order, told)
        pieces = list(self._pieces(texts, order, told))
        padded, broken = (
            self._render(_mark(messages, padding), add_generation_prompt, tools)
            for padding in (_PADDING, _LINES)
        )
        trims = tuple(_find_trim(padded, broken, index) for index in range(len(told)))
        return Plan(tuple(_group(pieces)), trims)

    def _find_end_token(self) -> str:
        question, answer = {"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}
        whole = self._render(_mark([question, answer]), False, None)
        found = self._pattern.search(_cut(whole)[0][-1])
        if found is None:
            after = _cut(whole)[0][-1]
            raise CapasError(
                f"the chat template writes no control token after an answer (only {after!r}), so the model "
                "would never learn to stop; let it end the assistant's turn with one, e.g. eos_token"
            )
        prompt = self._render(_mark([question]), True, None)
        if not whole.startswith(prompt):
            raise CapasError(
                "the chat template asks for an answer in another way than it writes one: the text with "
                f"add_generation_prompt, {_readable(prompt)!r}, does not begin the conversation "
                f"{_readable(whole)!r}; the model would be trained on one and asked with the other"
            )
        return self._name(found)

    def _pieces(
        self, texts: Sequence[str], order: Sequence[int], told: Messages
    ) -> Iterator[Control | Piece]:
        """Scaffold and contents as in the text; in `order`, index + n stands for an answer's calls."""
        for place, text in enumerate(texts):
            previous = order[place - 1] if place > 0 else None
            following = order[place] if place < len(order) else None
            calls = following is not None and following >= len(told)
            before, after = (None if i is None else i % len(told) for i in (previous, following))
            end = self._end_of_answer(text, before, after, told)
            start = max(end, len(text) - len(self._lead(text, after, told)))
            yield from self._scaffold(text[:end], before)
            yield from self._scaffold(text[end:start], None)
            yield from self._scaffold(text[start:], after)
            if after is not None and not calls:
                spoken = told[after]["role"] == "assistant"
                yield Piece("", after, after if spoken else None)

    def _scaffold(self, text: str, owner: int | None) -> Iterator[Control | Piece]:
        position = 0
        for found in self._pattern.finditer(text):
            if found.start() > position:
                yield Piece(reveal(text[position : found.start()]), None, owner)
            yield Control(found.group(), self._name(found), owner)
            position = found.end()
        if position < len(text):
            yield Piece(reveal(text[position:]), None, owner)

    def _end_of_answer(
        self,
        text: str,
        previous: int | None,
        following: int | None,
        told: Messages,
    ) -> int:
        """How much of the scaffold after an answer belongs to it: up to and including the end token."""
        if previous is None or told[previous]["role"] != "assistant":
            return 0
        if previous == following:
            return len(text)  # between what an answer says and its calls
        controls = list(self._pattern.finditer(text))
        if told[previous].get("tool_calls"):  # calls may have control tokens inside
            controls = [found for found in controls if self._name(found) == self.end_token]
        found = controls[0] if controls else None
        if found is not None and self._name(found) == self.end_token:
            return found.end()
        if found is None and following is not None and told[following]["role"] == "assistant":
            return len(text)  # the template makes one turn of two messages
        raise RecordRefusal(
            f"the chat template does not end message {previous} (assistant) with {self.end_token}, as it "
            f"does in a conversation of two messages, but goes on with {_readable(text)!r}"
        )

    def _lead(self, text: str, following: int | None, told: Messages) -> str:
        """What of the scaffold before an answer the generation prompt lacks: the model has to write it."""
        if not following or told[following]["role"] != "assistant":
            return ""
        try:
            prompt = _cut(self._render(told[:following], True, self._tools))[0][-1]
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


def _mark(messages: Messages, padding: str = "") -> list[Message]:
    """The conversation with marks for contents, and one in the first call of an answer that calls tools.

    Blank contents stay: templates ask whether one is empty. So do results of tools, which templates rewrite.
    """
    marked = []
    for index, message in enumerate(messages):
        told = dict(message)
        thought = message.get("thought", "")
        if message["role"] != "tool" and message["content"].removeprefix(thought).strip():
            told["content"] = f"{thought}{padding}{_mark_of(index)}{padding}"
        if message.get("tool_calls"):
            told["tool_calls"] = _mark_calls(message["tool_calls"], index + len(messages))
        marked.append(told)
    return marked


def _mark_calls(calls: Sequence[Any], index: int) -> list[Any]:
    first, *others = calls
    function = first.get("function", first)
    named = {**function, "name": _mark_of(index) + function["name"]}
    return [{**first, "function": named} if "function" in first else named, *others]


def _mark_of(index: int) -> str:
    return f"{_OPEN}{index}{_CLOSE}"


def _cut(text: str) -> tuple[list[str], list[int]]:
    """The texts between the marks, and the indices of the marks: one less."""
    parts = _MARK.split(text)
    return parts[::2], [int(index) for index in parts[1::2]]


def _check_each_once(order: Sequence[int], told: Messages) -> None:
    for index, message in enumerate(told):
        count = order.count(index)
        if count != 1 and _MARK.search(message["content"]):
            how = "leaves out" if count == 0 else f"writes {count} times"
            raise RecordRefusal(
                f"the chat template {how} message {index} ({message['role']}); every message must appear "
                "once (chat_template.system=fold keeps system text where a template has no place for it)"
            )
        if message.get("tool_calls") and order.count(index + len(told)) != 1:
            raise RecordRefusal(
                f"the chat template leaves out the tool calls of message {index}; this family has no place "
                "for them: choose a model whose template knows tools, or leave such records out"
            )


def _find_trim(padded: str, broken: str, index: int) -> Trim:
    """What the template does to white space at the ends of a content.

    Args:
        padded: rendered with blanks of several kinds around the mark.
        broken: rendered with line breaks around it, which some templates trim alone.
    """
    mark = _mark_of(index)
    before, found, after = padded.partition(mark)
    if not found:
        return NO_TRIM  # a blank content: part of the scaffold
    lines_before, _, lines_after = broken.partition(mark)
    left = _trimmed(before.endswith(_PADDING), lines_before.endswith(_LINES))
    right = _trimmed(after.startswith(_PADDING), lines_after.startswith(_LINES))
    return left, right


def _trimmed(keeps_blanks: bool, keeps_lines: bool) -> str | None:
    """The argument of `str.strip`."""
    if not keeps_blanks:
        return None
    return "" if keeps_lines else "\n"


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
