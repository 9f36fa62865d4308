"""Encode a planned conversation as ids, each with the answer that it belongs to."""

from collections.abc import Collection, Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import AddedToken, Tokenizer

from capas.chat.controls import control_pattern
from capas.chat.edges import Edges
from capas.chat.messages import Messages
from capas.chat.plan import Control, Piece, Plan, Segment, scaffold_before
from capas.chat.tokenizer import TokenizerFiles
from capas.core.errors import CapasError
from capas.core.ragged import Array, from_arrow

Owned = list[tuple[int, int | None]]  # token id, index of the answer that it belongs to


class Way(IntEnum):
    """The way in which the known ids of a content are used within the text around it."""

    JOIN = 0  # after the ids of the scaffold
    ABSORB = 1  # instead of the scaffold, too: a space that the tokenizer adds itself
    WHOLE = 2  # not at all: scaffold and content merge, and are encoded together


class SegmentEncoder:
    """An encoder of the segments between control tokens; none of their text can become a control token.

    Args:
        controls: the control tokens by their text, whether or not the tokenizer marks them as special.
    """

    def __init__(self, files: TokenizerFiles, controls: Mapping[str, AddedToken]) -> None:
        self._folder = files.folder
        self.control_ids = {text: files.id_of_text(text) for text in controls}
        # The unknown token is special, yet ordinary text may give it where the vocabulary lacks a character.
        self.forbidden_ids = frozenset(self.control_ids.values()) - {files.id_of("unk_token")}
        unmarked = {text: token for text, token in controls.items() if not token.special}
        self._unmarked = control_pattern(unmarked) if unmarked else None
        self._alone, self._inside = _build(files, unmarked)
        self._edges = Edges(self._inside, self._alone)
        self._ways = lru_cache(maxsize=65536)(self._find_way)  # contents have few beginnings
        self.encode_scaffold = lru_cache(maxsize=4096)(lambda part: self.encode_whole(part, []))

    def encode(self, plan: Plan, contents: list[str], messages: Messages) -> Owned:
        """Return the ids of a conversation with their owners.

        Args:
            contents: the contents, trimmed as the template trims them.
            messages: the messages with their original contents and, if known, the input_ids of these.

        Raises:
            CapasError: the vocabulary merges ordinary pieces of a content into a control token.
        """
        owned: Owned = []
        for part in plan.parts:
            if isinstance(part, Control):
                owned.append((self.control_ids[part.token], part.owner))
            else:
                owned += self._encode_segment(part, contents, messages)
        self._check_controls(owned, plan)
        return owned

    def _encode_segment(self, segment: Segment, contents: list[str], messages: Messages) -> Owned:
        """Return the known ids of a content if the border allows it, else the whole segment encoded again."""
        if all(piece.message is None for piece in segment.pieces):
            return self.encode_scaffold(segment)
        *before, last = segment.pieces
        if last.message is None or any(piece.message is not None for piece in before):
            return self.encode_whole(segment, contents)
        message = messages[last.message]
        way = self.way(*scaffold_before(segment), contents[last.message], message["content"])
        if way is Way.WHOLE:
            return self.encode_whole(segment, contents)
        joins = way is Way.JOIN and before
        lead = self.encode_scaffold(Segment(tuple(before), segment.first)) if joins else []
        return lead + [(i, last.owner) for i in self.known_ids(message)]

    def way(self, scaffold: str, one_owner: bool, content: str, original: str) -> Way:
        """Return how a content's known ids are used in a segment that ends with it and has no other content.

        Args:
            scaffold: the text before the content.
            one_owner: see `capas.chat.plan.scaffold_before`.
            content: the content, trimmed as the template trims it.
            original: the text that the known ids encode.
        """
        if content != original or (self._unmarked and self._unmarked.search(content)):
            return Way.WHOLE
        return self._ways(scaffold, one_owner, content[: self._edges.reach])

    def ways(self, scaffold: str, one_owner: bool, contents: pa.StringArray) -> Array:
        """Return `way` for each of many contents from which the template trims nothing."""
        starts = pc.utf8_slice_codeunits(contents, 0, self._edges.reach).dictionary_encode()
        known = [self._ways(scaffold, one_owner, start) for start in starts.dictionary.to_pylist()]
        found = np.array(known, np.int8)[from_arrow(starts.indices)]
        if self._unmarked:
            texts = contents.to_pylist()
            found[[bool(self._unmarked.search(text)) for text in texts]] = Way.WHOLE
        return found

    def _find_way(self, scaffold: str, one_owner: bool, start: str) -> Way:
        if self._edges.join(scaffold, start):
            return Way.JOIN
        if one_owner and self._edges.absorb(scaffold, start):
            return Way.ABSORB
        return Way.WHOLE

    def known_ids(self, message: Mapping[str, Any]) -> Sequence[int]:
        """Return the ids of a content as plain text."""
        if "input_ids" in message:
            known: Sequence[int] = message["input_ids"]
            return known
        return self._alone.encode(message["content"], add_special_tokens=False).ids

    def encode_whole(self, segment: Segment, contents: list[str]) -> Owned:
        """Return the ids of scaffold and contents encoded together; an answer begins with a token of its own.

        The text before the answer is the end of its prompt.
        """
        pieces, first = segment.pieces, segment.first
        together = self._encode_together(pieces, contents, first)
        start = next((i for i, piece in enumerate(pieces) if piece.owner is not None), 0)
        prompt = self._encode_together(pieces[:start], contents, first) if start else []
        if together[: len(prompt)] == prompt:
            return together
        apart = prompt + self._encode_together(pieces[start:], contents, False)
        # The texts differ if the tokenizer puts a space before a text.
        same = self._decode(apart) == self._decode(together)
        return apart if same else together

    def _encode_together(self, pieces: Sequence[Piece], contents: list[str], first: bool) -> Owned:
        """Return the ids of a text; a token with a character of an answer belongs to that answer."""
        texts = [piece.fill(contents) for piece in pieces]
        owners = [p.owner for p, text in zip(pieces, texts, strict=True) for _ in text]
        encoder = self._alone if first else self._inside
        encoding = encoder.encode("".join(texts), add_special_tokens=False)
        return [
            (i, next((o for o in owners[start : max(end, start + 1)] if o is not None), None))
            for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _decode(self, owned: Owned) -> str:
        text: str = self._inside.decode([i for i, _ in owned], skip_special_tokens=False)
        return text

    def _check_controls(self, owned: Owned, plan: Plan) -> None:
        found = len([i for i, _ in owned if i in self.forbidden_ids])
        if found > plan.num_controls:
            raise CapasError(
                f"{found - plan.num_controls} control token(s) were encoded from message contents: "
                f"the tokenizer in {self._folder} merges ordinary tokens into control tokens and "
                "cannot be used safely"
            )


def _build(files: TokenizerFiles, also_special: Collection[str]) -> tuple[Tokenizer, Tokenizer]:
    """Return the tokenizers for texts that begin the sequence and for texts inside it; often the same one."""
    alone = files.build(also_special=also_special)
    if not files.adds_first_blank:
        return alone, alone
    return alone, files.build(also_special=also_special, inside=True)
