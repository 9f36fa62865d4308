"""Decode token ids to readable text, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several if a character is spread over them (ñ, emoji)."""

    text: str
    ids: tuple[int, ...]
    positions: tuple[int, ...]
    control: bool


def cut(tokenizer: Tokenizer, input_ids: Sequence[int]) -> list[Piece]:
    """Return pieces whose texts, put together, are the decoded sequence; every id is in exactly one."""
    control = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    stream = DecodeStream(skip_special_tokens=False)
    pieces: list[Piece] = []
    waiting: list[int] = []
    for position, token_id in enumerate(input_ids):
        waiting.append(position)
        text = stream.step(tokenizer, token_id)
        if text is not None:
            pieces.append(_piece(text, input_ids, waiting, control))
            waiting = []
    return pieces + ([_piece(REPLACEMENT, input_ids, waiting, control)] if waiting else [])


def _piece(text: str, input_ids: Sequence[int], positions: list[int], control: set[int]) -> Piece:
    ids = tuple(input_ids[p] for p in positions)
    return Piece(text, ids, tuple(positions), control=len(ids) == 1 and ids[0] in control)
