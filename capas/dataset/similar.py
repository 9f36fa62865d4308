"""Find questions that are nearly the same: MinHash signatures and locality-sensitive hashing (datasketch).

A model answers a test question from memory if the training split has a near-duplicate. "Where is my order
4711?" and "Where is my order 9?" are near-duplicates: every run of digits counts as the same number.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capas.core.progress import doing
from capas.core.records import evenly_spaced
from capas.dataset.splits import normalised

MAX_RECORDS = 200_000  # the signature of each record is held in memory
_NUM_PERM, _SEED, _LENGTH = 128, 1, 4
_WEIGHTS = (0.1, 0.9)  # of false positives and negatives; every candidate is verified
_SAMPLE, _COMMON_FRACTION, _MIN_COMMON = 2000, 0.2, 20
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Groups:
    """Groups of near-duplicates: `labels` has the number of each text's group, [texts].

    A text that is alone in its group has no near-duplicate.
    """

    labels: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """The size of each text's group, [texts]."""
        return np.bincount(self.labels)[self.labels]


def similar_groups(texts: Sequence[str], similarity: float) -> Groups:
    """Group near-duplicate texts; a chain of near-duplicates is one group.

    Two texts are near-duplicates if the estimated Jaccard similarity of their runs of 4 letters and digits
    (ignoring case, spaces and punctuation) is at least `similarity`. Runs that occur in more than a fifth of
    the texts do not count, such as those of an instruction at the start of every text.

    Source: A. Broder, "On the resemblance and containment of documents", 1997.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, columns = np.array(_pairs(texts, similarity), np.int64).reshape(-1, 2).T
    links = coo_array((np.ones(len(rows), bool), (rows, columns)), (len(texts), len(texts)))
    return Groups(connected_components(links, directed=False)[1].astype(np.int64))


def _pairs(texts: Sequence[str], similarity: float) -> list[tuple[int, int]]:
    """Return pairs of near-duplicates that are sufficient to link every group."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=similarity, num_perm=_NUM_PERM, weights=_WEIGHTS)
    signatures: dict[int, MinHash] = {}  # by the index of the text
    first: dict[str, int] = {}  # equal texts share a signature
    pairs: list[tuple[int, int]] = []
    common = _common_runs(texts)
    with doing("comparing questions", len(texts)) as compared:
        for number, text in enumerate(texts):
            compared.step()
            plain = _plain(text)
            if first.setdefault(plain, number) != number:
                pairs.append((first[plain], number))
                continue
            signature = MinHash(num_perm=_NUM_PERM, seed=_SEED, hashfunc=zlib.crc32)
            signature.update_batch(sorted(_runs(plain) - common or {plain.encode()}))
            for other in index.query(signature):
                if signatures[other].jaccard(signature) >= similarity:
                    pairs.append((other, number))
            index.insert(number, signature)
            signatures[number] = signature
    return pairs


def _common_runs(texts: Sequence[str]) -> set[bytes]:
    """Return the runs that occur in more than a fifth of a sample of the texts, and in more than 20 texts."""
    sample = evenly_spaced(texts, _SAMPLE)
    counts = Counter(run for text in sample for run in _runs(_plain(text)))
    limit = max(_MIN_COMMON, _COMMON_FRACTION * len(sample))
    return {run for run, count in counts.items() if count > limit}


def _plain(text: str) -> str:
    return _DIGITS.sub("0", normalised(text))


def _runs(text: str) -> set[bytes]:
    starts = range(max(1, len(text) - _LENGTH + 1))
    return {text[i : i + _LENGTH].encode() for i in starts}
