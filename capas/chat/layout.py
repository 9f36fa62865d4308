"""Lay out a plan as columns: one per part, the same for all conversations of one pattern.

parts    <|im_start|>user\\n | CONTENT 0 | <|im_end|>\\n<|im_start|>assistant\\n | CONTENT 1 | <|im_end|> \\n
columns  constant ids          a slot      constant ids                       a slot      constant ids
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capas.chat.format import ChatFormat
from capas.chat.messages import Messages
from capas.chat.plan import Control, Plan, Segment, scaffold_before
from capas.chat.template import TemplateRefusal
from capas.core.ragged import Array


@dataclass(frozen=True)
class Constant:
    """Ids that all conversations of a pattern share; `owners` are the answers they belong to, or -1."""

    ids: Array
    owners: Array


@dataclass(frozen=True)
class Slot:
    """The place of a content, or of several with scaffold between them; `lead` is the scaffold before it."""

    segment: Segment
    lead: Constant
    scaffold: str  # the text of the lead
    one_owner: bool  # whether lead and content have the same owner

    @property
    def message(self) -> int | None:
        """The message whose known ids may be used here; None if the segment is encoded again as a whole."""
        last = self.segment.pieces[-1]
        alone = all(piece.message is None for piece in self.segment.pieces[:-1])
        return last.message if alone else None

    @property
    def owner(self) -> int | None:
        return self.segment.pieces[-1].owner


@dataclass(frozen=True)
class Prompt:
    """The place in the columns at which the prompt of the last answer ends."""

    num_columns: int  # whole columns in the prompt
    num_lead: int  # ids of the next column's lead that belong to the prompt


@dataclass(frozen=True)
class Layout:
    """The columns of a plan; `prompt` is None if the prompt is not a prefix of the conversation."""

    plan: Plan
    columns: tuple[Constant | Slot, ...]
    prompt: Prompt | None
    last_answer: int


def lay_out(chat: ChatFormat, messages: Messages) -> Layout:
    """Return the layout of all conversations with this one's pattern; it must end with an answer.

    Raises:
        CapasError: the template refuses the pattern.
    """
    plan = chat.plan(messages, add_generation_prompt=False)
    columns = _columns(plan.parts, chat)
    return Layout(plan, columns, _find_prompt(plan, chat, messages), len(messages) - 1)


def _columns(parts: Sequence[Control | Segment], chat: ChatFormat) -> tuple[Constant | Slot, ...]:
    """Return one column per part, in the order of the parts; `Prompt` relies on it."""
    return tuple(_column(part, chat) for part in parts)


def _column(part: Control | Segment, chat: ChatFormat) -> Constant | Slot:
    if isinstance(part, Control):
        return _constant([(chat.segments.control_ids[part.token], part.owner)])
    if all(piece.message is None for piece in part.pieces):
        return _constant(chat.segments.encode_scaffold(part))
    lead = Segment(part.pieces[:-1], part.first)
    is_scaffold = lead.pieces and all(piece.message is None for piece in lead.pieces)
    ids = _constant(chat.segments.encode_scaffold(lead) if is_scaffold else [])
    return Slot(part, ids, *scaffold_before(part))


def _constant(owned: Sequence[tuple[int, int | None]]) -> Constant:
    owners = [-1 if owner is None else owner for _, owner in owned]
    return Constant(np.array([i for i, _ in owned], np.int32), np.array(owners, np.int32))


def _find_prompt(plan: Plan, chat: ChatFormat, messages: Messages) -> Prompt | None:
    try:
        prompt_plan = chat.plan(messages[:-1], add_generation_prompt=True)
    except TemplateRefusal:
        return None
    count = len(prompt_plan.parts) - isinstance(prompt_plan.parts[-1], Segment)
    if plan.parts[:count] != prompt_plan.parts[:count] or plan.trims[:-1] != prompt_plan.trims:
        return None
    if count == len(prompt_plan.parts):
        return Prompt(count, 0)
    lead, goes_on = prompt_plan.parts[-1], plan.parts[count] if count < len(plan.parts) else None
    if not isinstance(goes_on, Segment) or not isinstance(lead, Segment):
        return None
    unowned = tuple(piece for piece in goes_on.pieces if piece.owner is None)
    if goes_on.pieces[: len(lead.pieces)] != lead.pieces or unowned != lead.pieces:
        return None
    if any(piece.message is not None for piece in lead.pieces):
        return None
    return Prompt(count, len(chat.segments.encode_scaffold(lead)))
