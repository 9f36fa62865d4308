"""Find the training prompt most similar to each test prompt, whose answer a baseline copies.

A model that scores no better than this baseline has learned nothing that a search would not give.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capas.core.records import evenly_spaced

MAX_TRAIN_PROMPTS = 50_000  # prompts to search, evenly spaced in a larger training split
TWIN, NEAR = 0.9, 0.6  # similarities from which a test record counts as a twin, or as near
_ROWS, _DIGITS = 256, 6


@dataclass(frozen=True)
class Neighbour:
    """The training prompt at `index`, and its similarity to the test prompt, from 0 to 1."""

    index: int
    similarity: float


def nearest_prompts(prompts: Sequence[str], train_prompts: Sequence[str]) -> list[Neighbour]:
    """Find the most similar training prompt of each prompt; of equally similar ones the first.

    Similarity is the cosine of TF-IDF vectors over runs of 3 and 4 characters within words
    (scikit-learn's TfidfVectorizer with sublinear term frequencies). It needs no list of words, so it works
    in any language. It is rounded to 6 digits, so that the last bit of a CPU decides nothing.

    Raises:
        ValueError: there is no training prompt.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not train_prompts:
        raise ValueError("there is no training prompt")
    searched = evenly_spaced(range(len(train_prompts)), MAX_TRAIN_PROMPTS)
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True)
    texts = [*(train_prompts[i] for i in searched), *prompts]
    vectors = vectorizer.fit_transform(
        [f"{text} ." for text in texts]
    )  # no text is left without a word
    known, queries = vectors[: len(searched)].T.tocsc(), vectors[len(searched) :]
    found: list[Neighbour] = []
    for start in range(0, len(prompts), _ROWS):
        similarities = np.round((queries[start : start + _ROWS] @ known).toarray(), _DIGITS)
        best = similarities.argmax(axis=1)
        values = similarities[np.arange(len(best)), best]
        found += [
            Neighbour(searched[i], min(1.0, float(value)))
            for i, value in zip(best.tolist(), values, strict=True)
        ]
    return found


def distance_group(similarity: float) -> str:
    """Return the group of test records for which a score is shown: twin, near or far."""
    return "twin" if similarity >= TWIN else "near" if similarity >= NEAR else "far"
