"""Find a chat template's scaffold, its text around contents, by rendering it once per pattern of roles.

The template is rendered with a mark in place of each content, and the text is split at its control tokens::

    <|im_start|>  user\\n MARK0  <|im_end|>  \\n  <|im_start|>  assistant\\n MARK1  <|im_end|>  \\n

Every segment between two control tokens is encoded separately, as tokenizers do. The model has to write the
tokens from the end of the generation prompt to the end token; they belong to the answer, their `owner`.
If an answer calls tools, the name of the first tool is marked, too: the text around it belongs to the answer.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from capas.chat.controls import Controls
from capas.chat.end_tokens import EndTokens, Render
from capas.chat.messages import Messages, Tools
from capas.chat.placeholders import Placeholders, mark_contents
from capas.chat.plan import NO_TRIM, Control, Piece, Plan, Segment, Trim
from capas.chat.template import RecordRefusal, TemplateRefusal

_PADDING, _LINES = " \t\n", "\n" * 5  # more line breaks than a scaffold itself has


class Planner:
    """A maker of plans for one template.

    Args:
        render: the template, including the policy for system messages.
        controls: the control tokens.
        ends: the tokens with which the template ends answers.
    """

    def __init__(self, render: Render, controls: Controls, ends: EndTokens) -> None:
        self.render, self.controls, self.ends = render, controls, ends

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


class _Conversation:
    """One conversation with marks for contents."""

    def __init__(
        self, planner: Planner, messages: Messages, placeholders: Placeholders, tools: Tools
    ) -> None:
        self._planner, self._tools, self._placeholders = planner, tools, placeholders
        self._messages, self._marked = messages, mark_contents(messages, placeholders)
        self._not_asked_for: set[int] = set()

    def plan(self, add_generation_prompt: bool) -> Plan:
        planner, placeholders = self._planner, self._placeholders
        rendered = planner.render(self._marked, add_generation_prompt, self._tools)
        texts, order = placeholders.cut(rendered)
        _check_each_once(order, self._marked, placeholders)
        pieces = list(self._pieces(texts, order))
        padded, broken = (
            planner.render(
                mark_contents(self._messages, placeholders, padding),
                add_generation_prompt,
                self._tools,
            )
            for padding in (_PADDING, _LINES)
        )
        marks = [placeholders.mark(index) for index in range(len(self._marked))]
        trims = tuple(_find_trim(padded, broken, mark) for mark in marks)
        return Plan(tuple(_group(pieces)), trims, frozenset(self._not_asked_for))

    def _pieces(self, texts: Sequence[str], order: Sequence[int]) -> Iterator[Control | Piece]:
        """Yield scaffold and contents in the order of the text.

        In `order`, index + number of messages stands for an answer's tool calls.
        """
        marked = self._marked
        for place, text in enumerate(texts):
            previous = order[place - 1] if place > 0 else None
            following = order[place] if place < len(order) else None
            calls = following is not None and following >= len(marked)
            before, after = (None if i is None else i % len(marked) for i in (previous, following))
            end = self._end_of_answer(text, before, after)
            lead = self._lead(text, after) if end < len(text) else ""
            start = max(end, len(text) - len(lead))
            yield from self._scaffold(text[:end], before)
            yield from self._scaffold(text[end:start], None)
            yield from self._scaffold(text[start:], after)
            if after is not None and not calls:
                spoken = marked[after]["role"] == "assistant"
                yield Piece("", after, after if spoken else None)

    def _scaffold(self, text: str, owner: int | None) -> Iterator[Control | Piece]:
        position, reveal = 0, self._placeholders.reveal
        for found, name in self._planner.controls.find(text):
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
        planner, marked = self._planner, self._marked
        if previous is None or marked[previous]["role"] != "assistant":
            return 0
        if previous == following:
            return len(text)  # between an answer's content and its calls
        controls = list(planner.controls.find(text))
        if marked[previous].get("tool_calls"):  # calls may have control tokens inside
            controls = [control for control in controls if control[1] in planner.ends.every]
        found, name = controls[0] if controls else (None, None)
        if found is not None and name in planner.ends.every:
            return found.end() if name in planner.ends.stops else found.start()
        if found is None and following is not None and marked[following]["role"] == "assistant":
            return len(text)  # the template joins two messages in one turn
        raise RecordRefusal(
            f"the chat template does not end message {previous} (assistant) with "
            f"{planner.ends.last}, as it does in a conversation of two messages, but goes on with "
            f"{self._placeholders.readable(text)!r}"
        )

    def _lead(self, text: str, following: int | None) -> str:
        """Return the part of the scaffold before an answer that is not in the prompt: the model writes it."""
        if following is None or self._marked[following]["role"] != "assistant":
            return ""
        try:
            rendered = self._planner.render(self._marked[:following], True, self._tools)
        except TemplateRefusal:
            return ""  # this answer has no prompt of its own
        prompt = self._placeholders.cut(rendered)[0][-1]
        if text.startswith(prompt):
            return text.removeprefix(prompt)
        # If later turns change earlier ones (Mistral puts system text into the last), look for its end only.
        starts = [found.start() for found, _ in self._planner.controls.find(prompt)]
        _, there, lead = text.rpartition(prompt[starts[-1] :] if starts else prompt)
        if not there:
            self._not_asked_for.add(following)
        return lead if there else ""


def _check_each_once(order: Sequence[int], marked: Messages, placeholders: Placeholders) -> None:
    for index, message in enumerate(marked):
        count = order.count(index)
        if count != 1 and placeholders.has_mark(message["content"]):
            how = "leaves out" if count == 0 else f"writes {count} times"
            raise RecordRefusal(
                f"the chat template {how} message {index} ({message['role']}), but every message "
                "must appear exactly once. For a template without a system role, set "
                "chat_template.system=fold"
            )
        if message.get("tool_calls") and order.count(index + len(marked)) != 1:
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
