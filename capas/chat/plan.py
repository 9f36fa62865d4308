"""How conversations of one pattern of roles are put together: control tokens, scaffold and contents in order.

<|im_start|>  user\\n CONTENT 0  <|im_end|>  \\n  <|im_start|>  assistant\\n CONTENT 1  <|im_end|>  \\n
"""

from collections.abc import Sequence
from dataclasses import dataclass

Trim = tuple[str | None, str | None]  # arguments of lstrip and rstrip: None stands for all blanks
NO_TRIM: Trim = ("", "")


@dataclass(frozen=True)
class Control:
    """A control token. `text` has the blanks too that the token swallows."""

    text: str
    token: str
    owner: int | None  # index of the assistant's message that it belongs to, if any


@dataclass(frozen=True)
class Piece:
    """Text of the scaffold or, where `message` is an index, the place of that message's content."""

    text: str
    message: int | None
    owner: int | None

    def fill(self, contents: Sequence[str]) -> str:
        return self.text if self.message is None else contents[self.message]


@dataclass(frozen=True)
class Segment:
    """What stands between two control tokens. `first`: nothing comes before it."""

    pieces: tuple[Piece, ...]
    first: bool

    def fill(self, contents: Sequence[str]) -> str:
        return "".join(piece.fill(contents) for piece in self.pieces)


def scaffold_before(segment: Segment) -> tuple[str, bool]:
    """The text before a segment's last piece, and whether there is some of the same owner as that piece."""
    *before, last = segment.pieces
    one_owner = bool(before) and all(piece.owner == last.owner for piece in before)
    return "".join([piece.text for piece in before]), one_owner


@dataclass(frozen=True)
class Plan:
    """How conversations of one pattern of roles are put together."""

    parts: tuple[Control | Segment, ...]
    trims: tuple[Trim, ...]  # per message: what the template does to the ends of a content
    # Answers before which the conversation does not go on as the prompt that asks for them ends.
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
        """The conversation as text; `contents` are trimmed already."""
        texts = (p.text if isinstance(p, Control) else p.fill(contents) for p in self.parts)
        return "".join(texts)
