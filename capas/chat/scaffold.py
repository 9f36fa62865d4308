"""Find a chat template's scaffold, its text around contents, by rendering it once per pattern of roles.

The template is rendered with a mark in place of each content, and the text is split at its control tokens::

    <|im_start|>  user\\n MARK0  <|im_end|>  \\n  <|im_start|>  assistant\\n MARK1  <|im_end|>  \\n

Every segment between two control tokens is encoded separately, as tokenizers do. The model has to write the
tokens from the end of the generation prompt to the end token; they belong to the answer, their `owner`.
If an answer calls tools, the name of the first tool is marked, too: the text around it belongs to the answer.

Most templates end every answer with the same control token. Harmony ends the last answer with one token and
earlier answers, like the user's turns, with another: `end_tokens` has both.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from tokenizers import AddedToken

from capas.chat.messages import Message, Messages, Tools
from capas.chat.placeholders import Placeholders
from capas.chat.plan import NO_TRIM, Control, Piece, Plan, Segment, Trim
from capas.chat.template import RecordRefusal, TemplateRefusal
from capas.core.errors import CapasError

Render = Callable[[Messages, bool, Tools], str]  # (messages, add_generation_prompt, tools)
_QUESTION, _ANSWER = {"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}
_THOUGHT = {"reasoning_content": "-"}
_PADDING, _LINES = " \t\n", "\n" * 5  # more line breaks than a scaffold itself has


class Planner:
    """A maker of plans for one template.

    Args:
        render: the template, including the policy for system messages.
        controls: the control tokens by their text.
        usual: stand-ins for conversations that contain none of the stand-in characters.

    Raises:
        CapasError: the template ends no answer with a control token, or its prompt is not a prefix of the
            conversation.
    """

    def __init__(
        self, render: Render, controls: Mapping[str, AddedToken], usual: Placeholders
    ) -> None:
        self._render = render
        self._pattern = control_pattern(controls)
        self._controls = controls
        self.end_token = self._find_end_token(usual)
        other = self._find_other_end_token(usual)
        others = [] if other is None else [other]
        self.end_tokens = [self.end_token, *others]
        # A token that also occurs inside an answer, after a thought say, must not stop the generation.
        inside = self._written_inside(usual) if others else set()
        self.stop_tokens = [self.end_token, *(token for token in others if token not in inside)]

    def plan(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        placeholders: Placeholders,
        tools: Tools = None,
    ) -> Plan:
        """Return the plan for conversations with these roles and, if they have any, these tools and calls.

        Args:
            messages, tools: a conversation in which control tokens are hidden: see `Placeholders`.

        Raises:
            CapasError: the template refuses, drops or repeats a message, or leaves an answer open.
        """
        return _Conversation(self, messages, placeholders, tools).plan(add_generation_prompt)

    def render(self, messages: Messages, add_generation_prompt: bool, tools: Tools) -> str:
        return self._render(messages, add_generation_prompt, tools)

    def find_controls(self, text: str) -> Iterator[tuple[re.Match[str], str]]:
        """Yield the control tokens in a text, with the whitespace that they strip, and their names."""
        for found in self._pattern.finditer(text):
            text_alone = found.group() in self._controls
            yield found, found.group() if text_alone else found.group().strip()

    def _find_end_token(self, usual: Placeholders) -> str:
        whole = self._example(usual, "-")
        after = usual.cut(whole)[0][-1]
        found = next((name for _, name in self.find_controls(after)), None)
        if found is None:
            raise CapasError(
                f"the chat template writes no control token after an answer (only {after!r}), so "
                "the model would never learn to stop. End the assistant's turn in the template "
                "with a control token, e.g. eos_token"
            )
        prompt = self.render(_mark([_QUESTION], usual), True, None)
        if not whole.startswith(prompt) and not self._asks_for_a_thought(prompt, usual):
            raise CapasError(
                "the chat template's prompt is not a prefix of its conversation: with "
                f"add_generation_prompt it renders {usual.readable(prompt)!r}, the whole "
                f"conversation is {usual.readable(whole)!r}. The model would be trained on one "
                "format and prompted in another"
            )
        return found

    def _asks_for_a_thought(self, prompt: str, usual: Placeholders) -> bool:
        """Return whether the prompt is a prefix if the answer begins with a thought, which it may open."""
        for told in ({"content": "<think>\n-\n</think>\n\n-"}, {"content": "-", **_THOUGHT}):
            with suppress(TemplateRefusal):
                if self._example(usual, **told).startswith(prompt):
                    return True
        return False

    def _example(self, usual: Placeholders, content: str, **more: str) -> str:
        """Return a rendered question and answer, with marks for contents."""
        answer = {"role": "assistant", "content": content, **more}
        return self.render(_mark([_QUESTION, usual.protect(answer)], usual), False, None)

    def _find_other_end_token(self, usual: Placeholders) -> str | None:
        """Return the token that ends answers before the last one, if it also ends the user's turns."""
        told = [_QUESTION, _ANSWER, _QUESTION, _ANSWER]
        try:
            texts = usual.cut(self.render(_mark(told, usual), False, None))[0]
        except TemplateRefusal:
            return None  # the family allows one turn only
        if len(texts) != len(told) + 1:
            return None
        of_user, of_answer = ([name for _, name in self.find_controls(text)] for text in texts[1:3])
        is_end = len(of_user) > 1 and of_user[:1] == of_answer[:1] != [self.end_token]
        return of_user[0] if is_end else None

    def _written_inside(self, usual: Placeholders) -> set[str]:
        """Return the control tokens between prompt and content if the answer begins with a thought."""
        prompt = self.render(_mark([_QUESTION], usual), True, None)
        try:
            before = self._example(usual, "-", **_THOUGHT).partition(usual.mark(1))[0]
        except TemplateRefusal:
            return set()
        return {name for _, name in self.find_controls(before.removeprefix(prompt))}


class _Conversation:
    """One conversation with marks for contents."""

    def __init__(
        self, planner: Planner, messages: Messages, placeholders: Placeholders, tools: Tools
    ) -> None:
        self._planner, self._tools, self._placeholders = planner, tools, placeholders
        self._messages, self._told = messages, _mark(messages, placeholders)
        self._not_asked_for: set[int] = set()

    def plan(self, add_generation_prompt: bool) -> Plan:
        planner, placeholders = self._planner, self._placeholders
        rendered = planner.render(self._told, add_generation_prompt, self._tools)
        texts, order = placeholders.cut(rendered)
        _check_each_once(order, self._told, placeholders)
        pieces = list(self._pieces(texts, order))
        padded, broken = (
            planner.render(
                _mark(self._messages, placeholders, padding), add_generation_prompt, self._tools
            )
            for padding in (_PADDING, _LINES)
        )
        marks = [placeholders.mark(index) for index in range(len(self._told))]
        trims = tuple(_find_trim(padded, broken, mark) for mark in marks)
        return Plan(tuple(_group(pieces)), trims, frozenset(self._not_asked_for))

    def _pieces(self, texts: Sequence[str], order: Sequence[int]) -> Iterator[Control | Piece]:
        """Yield scaffold and contents in the order of the text.

        In `order`, index + number of messages stands for an answer's tool calls.
        """
        told = self._told
        for place, text in enumerate(texts):
            previous = order[place - 1] if place > 0 else None
            following = order[place] if place < len(order) else None
            calls = following is not None and following >= len(told)
            before, after = (None if i is None else i % len(told) for i in (previous, following))
            end = self._end_of_answer(text, before, after)
            lead = self._lead(text, after) if end < len(text) else ""
            start = max(end, len(text) - len(lead))
            yield from self._scaffold(text[:end], before)
            yield from self._scaffold(text[end:start], None)
            yield from self._scaffold(text[start:], after)
            if after is not None and not calls:
                spoken = told[after]["role"] == "assistant"
                yield Piece("", after, after if spoken else None)

    def _scaffold(self, text: str, owner: int | None) -> Iterator[Control | Piece]:
        position, reveal = 0, self._placeholders.reveal
        for found, name in self._planner.find_controls(text):
            if found.start() > position:
                yield Piece(reveal(text[position : found.start()]), None, owner)
            yield Control(found.group(), name, owner)
            position = found.end()
        if position < len(text):
            yield Piece(reveal(text[position:]), None, owner)

    def _end_of_answer(self, text: str, previous: int | None, following: int | None) -> int:
        """Return how many characters of the scaffold after an answer belong to it, its end token included.

        An end token that does not stop generation is excluded: the model need not write it.

        Raises:
            RecordRefusal: the template does not end the answer.
        """
        planner, told = self._planner, self._told
        if previous is None or told[previous]["role"] != "assistant":
            return 0
        if previous == following:
            return len(text)  # between an answer's content and its calls
        controls = list(planner.find_controls(text))
        if told[previous].get("tool_calls"):  # calls may have control tokens inside
            controls = [control for control in controls if control[1] in planner.end_tokens]
        found, name = controls[0] if controls else (None, None)
        if found is not None and name in planner.end_tokens:
            return found.end() if name in planner.stop_tokens else found.start()
        if found is None and following is not None and told[following]["role"] == "assistant":
            return len(text)  # the template joins two messages in one turn
        raise RecordRefusal(
            f"the chat template does not end message {previous} (assistant) with {planner.end_token}, as it "
            "does in a conversation of two messages, but goes on with "
            f"{self._placeholders.readable(text)!r}"
        )

    def _lead(self, text: str, following: int | None) -> str:
        """Return the part of the scaffold before an answer that is not in the prompt: the model writes it."""
        if following is None or self._told[following]["role"] != "assistant":
            return ""
        try:
            asked = self._planner.render(self._told[:following], True, self._tools)
        except TemplateRefusal:
            return ""  # this answer has no prompt of its own
        prompt = self._placeholders.cut(asked)[0][-1]
        if text.startswith(prompt):
            return text.removeprefix(prompt)
        # If later turns change earlier ones (Mistral puts system text into the last), look for its end only.
        starts = [found.start() for found, _ in self._planner.find_controls(prompt)]
        _, there, lead = text.rpartition(prompt[starts[-1] :] if starts else prompt)
        if not there:
            self._not_asked_for.add(following)
        return lead if there else ""


def control_pattern(controls: Mapping[str, AddedToken]) -> re.Pattern[str]:
    """Return a pattern that finds control tokens, the longest first, with the whitespace that they strip."""
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


def _mark(messages: Messages, placeholders: Placeholders, padding: str = "") -> list[Message]:
    """Return the conversation with marks for contents, and one in an answer's first tool call.

    Blank contents stay, because templates test whether a content is empty. So do the results of tools, which
    templates rewrite.
    """
    marked = []
    for index, message in enumerate(messages):
        told = dict(message)
        thought = message.get("thought", "")
        if message["role"] != "tool" and message["content"].removeprefix(thought).strip():
            told["content"] = f"{thought}{padding}{placeholders.mark(index)}{padding}"
        if message.get("tool_calls"):
            mark = placeholders.mark(index + len(messages))
            told["tool_calls"] = _mark_calls(message["tool_calls"], mark)
        marked.append(told)
    return marked


def _mark_calls(calls: Sequence[Any], mark: str) -> list[Any]:
    first, *others = calls
    function = first.get("function", first)
    named = {**function, "name": mark + function["name"]}
    return [{**first, "function": named} if "function" in first else named, *others]


def _check_each_once(order: Sequence[int], told: Messages, placeholders: Placeholders) -> None:
    for index, message in enumerate(told):
        count = order.count(index)
        if count != 1 and placeholders.has_mark(message["content"]):
            how = "leaves out" if count == 0 else f"writes {count} times"
            raise RecordRefusal(
                f"the chat template {how} message {index} ({message['role']}), but every message "
                "must appear exactly once. For a template without a system role, set "
                "chat_template.system=fold"
            )
        if message.get("tool_calls") and order.count(index + len(told)) != 1:
            raise RecordRefusal(
                f"the chat template drops the tool calls of message {index}: this model family does "
                "not support tools. Choose a model whose template does, or remove such records"
            )


def _find_trim(padded: str, broken: str, mark: str) -> Trim:
    """Return the whitespace that the template trims from the ends of a content.

    Args:
        padded: the text rendered with whitespace of several kinds around the mark.
        broken: the text rendered with line breaks around the mark; some templates trim only these.
    """
    before, found, after = padded.partition(mark)
    if not found:
        return NO_TRIM  # a blank content is part of the scaffold
    lines_before, _, lines_after = broken.partition(mark)
    left = _trimmed(before.endswith(_PADDING), lines_before.endswith(_LINES))
    right = _trimmed(after.startswith(_PADDING), lines_after.startswith(_LINES))
    return left, right


def _trimmed(keeps_blanks: bool, keeps_lines: bool) -> str | None:
    """Return the argument of `str.strip` that trims as the template does."""
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
