"""Decide whether two texts encoded separately give the same ids as the two encoded together.

A content was encoded by itself. After the scaffold's `user\\n` its ids may be reused only if the tokenizer
splits between the two. A content that begins with a line break would merge with the line break before it.
"""

import unicodedata
from functools import cached_property, lru_cache

from tokenizers import Tokenizer
from tokenizers.models import BPE

from capas.chat.tokenizer import WORD_START

_WINDOW = 4  # characters of a content that can decide whether a pre-tokenizer splits before it


class Edges:
    """The edges between scaffold and contents, for one tokenizer that parses no control tokens.

    Args:
        inside: the tokenizer for texts after a control token.
        alone: the tokenizer for a text that begins the sequence, where SentencePiece adds a space.
    """

    def __init__(self, inside: Tokenizer, alone: Tokenizer) -> None:
        self._inside = inside
        added = inside.get_added_tokens_decoder().values()
        self._words = [token for token in added if not token.special]
        self._merges = isinstance(inside.model, BPE)
        probes = (alone, "a"), (inside, "a"), (inside, " a")
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for tokenizer, text in probes]
        self.adds_blank = ids[0] != ids[1]  # a text alone is encoded as if a space came before it
        self._blank_is_space = ids[0] == ids[2]
        self._scaffold_pieces = lru_cache(maxsize=1024)(self._pieces)
        self._joins = lru_cache(maxsize=65536)(self._find_join)  # contents have few beginnings
        self._remainders = lru_cache(maxsize=1024)(self._find_remainders)
        # Leading characters of a content on which the results of `join` and `absorb` may depend.
        self.reach = max([_WINDOW, *(len(token.content) for token in self._words)])

    def join(self, scaffold: str, content: str) -> bool:
        """Return whether ids(scaffold + content) == ids(scaffold) + ids(content)."""
        if content.startswith(self._remainders(scaffold)):
            return False
        return self._joins(scaffold, content[:_WINDOW])

    def absorb(self, scaffold: str, content: str) -> bool:
        """Return whether ids(scaffold + content) == ids(content).

        They are equal if the scaffold is the one space that the tokenizer adds itself.
        """
        if not (self.adds_blank and self._blank_is_space and scaffold == " "):
            return False
        return bool(content) and not content.startswith(self._get_no_blank)

    def _find_join(self, scaffold: str, start: str) -> bool:
        if self.adds_blank or not start or _may_combine(start[0]):
            return False
        return not scaffold or self._are_cut(scaffold, start)

    def _are_cut(self, scaffold: str, start: str) -> bool:
        before, after = self._scaffold_pieces(scaffold), self._pieces(start)
        both = self._pieces(scaffold + start)
        if both == before + after:
            return True
        uncut = self._merges and len(before) == len(after) == len(both) == 1
        if not uncut or both[0] != before[0] + after[0]:
            return False
        return before[0][-1:] + after[0][:1] not in self._bigrams

    def _find_remainders(self, scaffold: str) -> tuple[str, ...]:
        """Return the beginnings of contents that an added token would attach to the scaffold.

        Either the scaffold ends with the token's beginning, or the token strips the scaffold's whitespace.
        """
        completing = [
            token.content[cut:]
            for token in self._words
            for cut in range(1, len(token.content))
            if scaffold.endswith(token.content[:cut])
        ]
        swallows_blanks = [t.content for t in self._words if t.lstrip and scaffold[-1:].isspace()]
        return tuple(completing + swallows_blanks)

    @cached_property
    def _get_no_blank(self) -> tuple[str, ...]:
        words = [token.content for token in self._words]
        return (" ", WORD_START, *words, *self._remainders(" "))

    def _pieces(self, text: str) -> list[str]:
        normalizer, splitter = self._inside.normalizer, self._inside.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        return [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text]

    @cached_property
    def _bigrams(self) -> frozenset[str]:
        """The pairs of adjacent characters in vocabulary entries; no merge joins any other pair."""
        vocabulary = self._inside.get_vocab(with_added_tokens=True)
        return frozenset(token[i : i + 2] for token in vocabulary for i in range(len(token) - 1))


def _may_combine(character: str) -> bool:
    """Return whether a character may merge with the one before: whitespace or a combining mark."""
    return (
        character.isspace() or character == WORD_START or unicodedata.category(character)[0] == "M"
    )
