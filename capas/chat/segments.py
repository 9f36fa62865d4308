"""A planned conversation as ids, each with the answer that it belongs to."""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer

from capas.chat.edges import Edges
from capas.chat.messages import Messages
from capas.chat.plan import Control, Plan, Segment
from capas.chat.scaffold import control_pattern
from capas.chat.tokenizer import TokenizerFiles
from capas.errors import CapasError

Owned = list[tuple[int, int | None]]  # token id, index of the answer that it belongs to


class SegmentEncoder:
    """Encodes what stands between control tokens; no text of it can become a control token.

    Args:
        controls: the control tokens by their text, whether the tokenizer marks them as special or not.
    """

    def __init__(self, files: TokenizerFiles, controls: Mapping[str, AddedToken]) -> None:
        self._folder = files.folder
        self.control_ids = {text: files.id_of_text(text) for text in controls}
        # The unknown token is special, yet an ordinary text may hold what a vocabulary lacks.
        self._forbidden = frozenset(self.control_ids.values()) - {files.id_of("unk_token")}
        unmarked = {text: token for text, token in controls.items() if not token.special}
        self._unmarked: re.Pattern[str] = control_pattern(unmarked)
        self._alone, self._inside = _build(files, unmarked)
        self._edges = Edges(self._inside, self._alone)
        self._encode_scaffold = lru_cache(maxsize=4096)(lambda part: self._encode_whole(part, []))

    def encode(self, plan: Plan, contents: list[str], messages: Messages) -> Owned:
        """The ids of a conversation.

        Args:
            contents: trimmed as the template does.
            messages: with the contents as they are and, where they are known, their input_ids.

        Raises:
            CapasError: the vocabulary makes a control token out of ordinary pieces of a content.
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
        """The known ids of a content where the border allows it, else those of the whole segment anew."""
        *before, last = segment.pieces
        if all(piece.message is None for piece in segment.pieces):
            return self._encode_scaffold(segment)
        if last.message is None or len(before) > 1 or (before and before[0].message is not None):
            return self._encode_whole(segment, contents)
        content, message = contents[last.message], messages[last.message]
        if content != message["content"] or self._unmarked.search(content):
            return self._encode_whole(segment, contents)
        scaffold = before[0].text if before else ""
        if self._edges.join(scaffold, content):
            start = self._encode_scaffold(Segment(tuple(before), segment.first)) if before else []
            return start + [(i, last.owner) for i in self.known_ids(message)]
        one_owner = bool(before) and before[0].owner == last.owner
        if one_owner and self._edges.absorb(scaffold, content):
            return [(i, last.owner) for i in self.known_ids(message)]
        return self._encode_whole(segment, contents)

    def known_ids(self, message: Mapping[str, Any]) -> Sequence[int]:
        """The ids of a content as plain text."""
        if "input_ids" in message:
            known: Sequence[int] = message["input_ids"]
            return known
        return self._alone.encode(message["content"], add_special_tokens=False).ids

    def _encode_whole(self, segment: Segment, contents: list[str]) -> Owned:
        """A token that holds a character of an answer belongs to the answer."""
        texts = [piece.fill(contents) for piece in segment.pieces]
        owners = [p.owner for p, text in zip(segment.pieces, texts, strict=True) for _ in text]
        encoder = self._alone if segment.first else self._inside
        encoding = encoder.encode("".join(texts), add_special_tokens=False)
        return [
            (i, next((o for o in owners[start : max(end, start + 1)] if o is not None), None))
            for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _check_controls(self, owned: Owned, plan: Plan) -> None:
        found = len([i for i, _ in owned if i in self._forbidden])
        if found > plan.num_controls:
            raise CapasError(
                f"{found - plan.num_controls} control token(s) came out of contents; the tokenizer in "
                f"{self._folder} makes them out of ordinary pieces and cannot be used safely"
            )


def _build(files: TokenizerFiles, also_special: Collection[str]) -> tuple[Tokenizer, Tokenizer]:
    """For texts that begin the sequence, and for those that stand inside it; often the same."""
    alone = files.build(also_special=also_special)
    if not files.adds_first_blank:
        return alone, alone
    return alone, files.build(also_special=also_special, inside=True)
