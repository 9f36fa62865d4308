"""Describe how conversations of one pattern of roles are assembled: control tokens, scaffold, contents.

<|im_start|>  user\\n CONTENT 0  <|im_end|>  \\n  <|im_start|>  assistant\\n CONTENT 1  <|im_end|>  \\n
"""

from collections.abc import Sequence
from dataclasses import dataclass

Trim = tuple[str | None, str | None]  # arguments of lstrip and rstrip; None is all whitespace
NO_TRIM: Trim = ("", "")


@dataclass(frozen=True)
class Control:
    """A control token; `text` includes the whitespace that the token strips."""

    text: str
    token: str
    owner: int | None  # index of the answer that the token belongs to, if any


@dataclass(frozen=True)
class Piece:
    """A text of the scaffold, or the place of a content, if `message` is the index of a message."""

    text: str
    message: int | None
    owner: int | None

    def fill(self, contents: Sequence[str]) -> str:
        return self.text if self.message is None else contents[self.message]


@dataclass(frozen=True)
class Segment:
    """The pieces between two control tokens; `first` is true at the beginning of the conversation."""

    pieces: tuple[Piece, ...]
    first: bool

    def fill(self, contents: Sequence[str]) -> str:
        return "".join(piece.fill(contents) for piece in self.pieces)


def scaffold_before(segment: Segment) -> tuple[str, bool]:
    """Return the text before a segment's last piece, and whether it exists and has the last piece's owner."""
    *before, last = segment.pieces
    one_owner = bool(before) and all(piece.owner == last.owner for piece in before)
    return "".join([piece.text for piece in before]), one_owner


@dataclass(frozen=True)
class Plan:
    """A plan of how conversations of one pattern of roles are assembled."""

    parts: tuple[Control | Segment, ...]
    trims: tuple[Trim, ...]  # per message: the whitespace that the template trims from its content
    # Answers whose prompt is not a prefix of the conversation.
    not_asked_for: frozenset[int] = frozenset()

    @property
    def num_controls(self) -> int:
        return sum(isinstance(part, Control) for part in self.parts)

    def trim(self, contents: Sequence[str]) -> list[str]:
        return [
            content.lstrip(left).rstrip(right)
            for (left, right), content in zip(self.trims, contents, strict=True)
        ]

    def fill(self, contents: Sequence[str]) -> str:
        """Return the conversation as text; `contents` are already trimmed."""
        texts = (p.text if isinstance(p, Control) else p.fill(contents) for p in self.parts)
        return "".join(texts)
