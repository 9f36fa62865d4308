"""A plan as columns: what each part of a conversation becomes, the same for all conversations of one pattern.

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
    """Ids that stand in every conversation of the pattern. owners: whose answer each belongs to, -1: none."""

    ids: Array
    owners: Array


@dataclass(frozen=True)
class Slot:
    """The place of a content, or of several with scaffold between them. lead: what stands before it."""

    segment: Segment
    lead: Constant
    scaffold: str  # the text of the lead
    one_owner: bool  # whether the lead belongs to whom the content belongs to

    @property
    def message(self) -> int | None:
        """The message whose known ids may stand here; None where the segment is encoded anew."""
        last = self.segment.pieces[-1]
        alone = all(piece.message is None for piece in self.segment.pieces[:-1])
        return last.message if alone else None

    @property
    def owner(self) -> int | None:
        return self.segment.pieces[-1].owner


@dataclass(frozen=True)
class Prompt:
    """Where in the columns the prompt of the last answer ends."""

    num_columns: int  # whole columns
    num_lead: int  # ids of the next column's lead


@dataclass(frozen=True)
class Layout:
    """The columns of a plan. `prompt` is None where the prompt does not begin the conversation."""

    plan: Plan
    columns: tuple[Constant | Slot, ...]
    prompt: Prompt | None
    last_answer: int


def lay_out(chat: ChatFormat, messages: Messages) -> Layout:
    """The layout of conversations with the pattern of this one, which ends with an answer.

    Raises:
        CapasError: the template refuses the pattern.
    """
    plan = chat.plan(messages, add_generation_prompt=False)
    columns = _columns(plan.parts, chat)
    return Layout(plan, columns, _find_prompt(plan, chat, messages), len(messages) - 1)


def _columns(parts: Sequence[Control | Segment], chat: ChatFormat) -> tuple[Constant | Slot, ...]:
    """One column per part; where each stands, `Prompt` counts on it."""
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
        asked = chat.plan(messages[:-1], add_generation_prompt=True)
    except TemplateRefusal:
        return None
    count = len(asked.parts) - isinstance(asked.parts[-1], Segment)
    if plan.parts[:count] != asked.parts[:count] or plan.trims[:-1] != asked.trims:
        return None
    if count == len(asked.parts):
        return Prompt(count, 0)
    lead, goes_on = asked.parts[-1], plan.parts[count] if count < len(plan.parts) else None
    if not isinstance(goes_on, Segment) or not isinstance(lead, Segment):
        return None
    unowned = tuple(piece for piece in goes_on.pieces if piece.owner is None)
    if goes_on.pieces[: len(lead.pieces)] != lead.pieces or unowned != lead.pieces:
        return None
    if any(piece.message is not None for piece in lead.pieces):
        return None
    return Prompt(count, len(chat.segments.encode_scaffold(lead)))
