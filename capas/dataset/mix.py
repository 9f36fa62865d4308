"""Draw a weighted mixture of sources: how many records of each, and which."""

from collections.abc import Sequence

import numpy as np

from capas.dataset.splits import Digests, Marks, scrambled, smallest


def num_drawn(weights: Sequence[float], counts: Sequence[int], seed: int) -> list[int]:
    """Return how many records of each source are drawn, in random order, until one source is used up.

    The rule is that of `datasets.interleave_datasets(..., stopping_strategy="first_exhausted")`.

    Args:
        weights: the sources' weights, in any unit; they are normalised to sum to 1.
        counts: the number of records in each source.
    """
    probabilities = np.array(weights, float) / sum(weights)
    generator = np.random.default_rng(seed)
    drawn = np.zeros(len(counts), np.int64)
    while True:
        draws = generator.choice(len(counts), size=65536, p=probabilities)
        running = drawn + np.cumsum(draws[:, None] == np.arange(len(counts)), axis=0)
        full = (running >= np.array(counts)).any(axis=1)
        if full.any():
            return [int(n) for n in running[full.argmax()]]
        drawn = running[-1]


def drawn(sources: np.ndarray, hashes: Digests, weights: Sequence[float], seed: int) -> Marks:
    """Return [records] bool: true for the records of the mixture, those with each source's smallest hashes.

    Their order does not change, because training shuffles them.
    """
    numbers = [int(np.sum(sources == i)) for i in range(len(weights))]
    marks = np.zeros(len(sources), bool)
    ordered = scrambled(hashes, seed)
    for source, count in enumerate(num_drawn(weights, numbers, seed)):
        mine = sources == source
        marks[mine] = smallest(ordered[mine], count)
    return marks
