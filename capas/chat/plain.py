"""Encode texts as ids in batches, with `fastokens` where it supports the tokenizer, else with `tokenizers`.

fastokens is many times faster, and refuses tokenizers that it does not support. Its ids are checked: a sample
of every batch is encoded with tokenizers as well.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from capas.chat.tokenizer import WORD_START, TokenizerFiles, encode_plain
from capas.core.errors import CapasError
from capas.core.ragged import Ragged, offsets_of

CHECKED_FIRST, CHECKED_EVERY = 20, 100  # both libraries encode these texts of a batch
log = logging.getLogger("capas")


class PlainEncoder:
    """An encoder of plain text: no text becomes a control token.

    Args:
        fast: whether to use fastokens if possible; the ids are the same.
    """

    def __init__(self, files: TokenizerFiles, fast: bool = True) -> None:
        self._folder = files.folder
        library = _import_fastokens() if fast else None
        spec, self._adds_blank = files.plain_json() if library else ("", False)
        with ThreadPoolExecutor(1) as beside:  # fastokens lets other threads run while it builds
            building = beside.submit(_build_fast, library, spec) if library else None
            self._sure = files.build()
            self._fast = building.result() if building else None
        if self._fast and not _knows_every_character(self._sure):
            log.info(
                "encoding with tokenizers (not fastokens): this vocabulary has no token for some "
                "characters"
            )
            self._fast = None

    @property
    def backend(self) -> str:
        return "fastokens" if self._fast else "tokenizers"

    def encode(self, texts: Sequence[str]) -> Ragged:
        """Return the ids of each text, int32.

        Raises:
            CapasError: the two libraries disagree on a text of the sample.
        """
        if self._fast is None:
            return self._encode_surely(texts)
        given = [_with_blank(text) for text in texts] if self._adds_blank else texts
        ids, offsets = self._fast.encode_batch_flat(given)
        found = Ragged(
            np.frombuffer(ids, np.uint32).astype(np.int32),
            np.frombuffer(offsets, np.uint64).astype(np.int64),
        )
        self._check(texts, found)
        return found

    def _encode_surely(self, texts: Sequence[str]) -> Ragged:
        rows = encode_plain(self._sure, texts)
        offsets = offsets_of(np.fromiter(map(len, rows), np.int64, len(rows)))
        values = np.fromiter(chain.from_iterable(rows), np.int32, int(offsets[-1]))
        return Ragged(values, offsets)

    def _check(self, texts: Sequence[str], found: Ragged) -> None:
        count = len(texts)
        sample = sorted({*range(min(CHECKED_FIRST, count)), *range(0, count, CHECKED_EVERY)})
        expected = self._encode_surely([texts[index] for index in sample])
        for place, index in enumerate(sample):
            if not np.array_equal(expected.row(place), found.row(index)):
                raise CapasError(
                    f"fastokens and tokenizers encode {texts[index][:80]!r} differently with the tokenizer "
                    f"in {self._folder}: {found.row(index)[:12]} and {expected.row(place)[:12]}. Please "
                    "report it; `pip uninstall fastokens` makes capas use tokenizers alone."
                )


def _knows_every_character(tokenizer: Tokenizer) -> bool:
    """Return whether the vocabulary has a token for every character.

    If it has not, the libraries differ: tokenizers joins the neighbours of a character without a token.
    """
    model = tokenizer.model
    if not isinstance(model, BPE) or model.unk_token is not None:
        return True
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = in_bytes if model.byte_fallback else ByteLevel.alphabet()
    return all(tokenizer.token_to_id(character) is not None for character in characters)


def _with_blank(text: str) -> str:
    """Return the text with a space before its first word, as SentencePiece adds one if there is none."""
    return text if not text or text.startswith((" ", WORD_START)) else " " + text


def _import_fastokens() -> Any:
    try:
        import fastokens
    except ImportError:
        log.info("fastokens is not installed: encoding with tokenizers (same ids, slower)")
        return None
    return fastokens


def _build_fast(library: Any, spec: str) -> Any:
    """Return fastokens' tokenizer, or None if fastokens does not support it."""
    try:
        return library.Tokenizer.from_json_str(spec)
    except ValueError as refusal:
        log.info("encoding with tokenizers: fastokens does not support this tokenizer: %s", refusal)
        return None
