"""Assign records to splits by digests of 8 bytes, so that millions of records fit in memory.

A digest is the beginning of a sha256. Among a million different records, the probability that any two share a
digest is 3e-8.
"""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capas.core.records import SPLITS

Digests = NDArray[np.uint64]
Marks = NDArray[np.bool_]
TRAIN, VALIDATION, TEST = range(len(SPLITS))
DEFAULT_TEST_RECORDS, DEFAULT_TEST_FRACTION = 100, 0.2


class _LettersAndDigits(dict[int, int | None]):
    """A table of `str.translate` that keeps letters, the marks on them, and digits."""

    def __missing__(self, point: int) -> int | None:
        keeps = unicodedata.category(chr(point))[0] in "LMN"
        self[point] = point if keeps else None
        return self[point]


_TABLE = _LettersAndDigits()


def normalised(text: str) -> str:
    """Return a text without case, spaces and punctuation, its characters in the normal form NFKC.

    A text without letters and digits keeps its spaces and punctuation.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate(_TABLE) or folded


def digest(*texts: str) -> int:
    """Return 64 bits of a sha256 over the lengths of the texts, then the texts."""
    lengths = ",".join([str(len(text)) for text in texts])
    whole = hashlib.sha256(f"{lengths}\n{''.join(texts)}".encode())
    return int.from_bytes(whole.digest()[:8], "big")


def content_digest(record: Mapping[str, Any]) -> int:
    """Return a digest of a record's exact messages and tools; id and metadata do not count."""
    parts = (
        part
        for m in record["messages"]
        for part in (m["role"], m["content"], m["extra"], "" if m["train"] else "untrained")
    )
    return digest(record["tools"], *parts)


def prompt_digests(messages: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the digests (group, prompt) of a conversation's normalised contents.

    The group covers the messages before the first answer. Records of one group share a split, so threads that
    begin alike stay together. The prompt covers all messages before the last answer. The same prompt in two
    splits is a leak. A plain text is both group and prompt.
    """
    answers = [i for i, m in enumerate(messages) if i and m["role"] == "assistant"] or [
        len(messages)
    ]
    contents = [normalised(m["content"]) for m in messages[: answers[-1]]]
    group = digest(*contents[: answers[0]])
    return group, group if len(answers) == 1 else digest(*contents)


def scrambled(digests: Digests, seed: int) -> Digests:
    """Return other 64 bits for each digest and seed, evenly distributed (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = digests + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def shares(groups: Digests, validation: float, test: float, seed: int) -> NDArray[np.uint8]:
    """Return the split of each record by a hash of its group, so adding records never moves existing ones."""
    place = scrambled(groups, seed) / 2.0**64
    return np.where(
        place < test, TEST, np.where(place < test + validation, VALIDATION, TRAIN)
    ).astype(np.uint8)


def num_test_records(num_records: int, fraction: float | None) -> int:
    """Return the size of a test split: `fraction` of the records, or min(100, 20 %) if it is None."""
    if fraction is not None:
        return round(fraction * num_records)
    return min(DEFAULT_TEST_RECORDS, round(DEFAULT_TEST_FRACTION * num_records))


def cluster_shares(
    labels: NDArray[np.int64], content: Digests, validation: int, test: int, seed: int
) -> NDArray[np.uint8]:
    """Return the split of each record, with all records of a cluster in one split.

    Clusters are assigned in the order of a seeded hash, the smallest of their contents' hashes: to test if
    they fit, else to validation. A cluster that fits into neither goes to train.

    Args:
        labels: [records], the number of each record's cluster.
        validation: the number of records wanted in validation.
        test: the number of records wanted in test.
    """
    # Scrambled twice, so that the order differs from that in which `smallest` takes a subset.
    hashes = scrambled(scrambled(content, seed), seed)
    smallest_hash = np.full(labels.max(initial=-1) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest_hash, labels, hashes)
    sizes = np.bincount(labels, minlength=len(smallest_hash))
    of_cluster = np.full(len(smallest_hash), TRAIN, np.uint8)
    left = {TEST: test, VALIDATION: validation}
    for cluster in np.argsort(smallest_hash, kind="stable"):
        for split, wanted in left.items():
            if sizes[cluster] <= wanted:
                of_cluster[cluster] = split
                left[split] -= int(sizes[cluster])
                break
    return of_cluster[labels]


def ordinals(digests: Digests) -> NDArray[np.int64]:
    """Return, for each digest, how often it occurred before."""
    order = np.argsort(digests, kind="stable")
    positions, ordered = np.arange(len(digests)), digests[order]
    starts = np.ones(len(digests), bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    found = np.empty(len(digests), np.int64)
    found[order] = positions - np.maximum.accumulate(np.where(starts, positions, 0))
    return found


def leaks(prompts: Digests, splits: NDArray[np.uint8]) -> Marks:
    """Return [records] bool: true for a prompt in train that is also in validation or test, and for one in
    validation that is also in test.
    """
    of = [prompts[splits == split] for split in range(len(SPLITS))]
    found = np.zeros(len(prompts), bool)
    found[splits == TRAIN] = np.isin(of[TRAIN], np.concatenate([of[VALIDATION], of[TEST]]))
    found[splits == VALIDATION] = np.isin(of[VALIDATION], of[TEST])
    return found


def smallest(hashes: Digests, count: int) -> Marks:
    """Return [records] bool: true for the `count` smallest hashes.

    With seeded hashes this is a random subset that hardly changes as records are added.
    """
    marks = np.zeros(len(hashes), bool)
    marks[np.argsort(hashes, kind="stable")[:count]] = True
    return marks
