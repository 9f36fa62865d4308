"""How many records of each source a weighted mixture takes."""

from collections.abc import Sequence

import numpy as np

from capas.dataset.splits import Digests, Marks, scrambled, smallest


def num_drawn(weights: Sequence[float], counts: Sequence[int], seed: int) -> list[int]:
    """Draw sources with these probabilities until one is used up; how many records of each were drawn.

    As `datasets.interleave_datasets(..., stopping_strategy="first_exhausted")`.

    Args:
        weights: in any unit; they are made to sum to 1.
        counts: records that each source has.
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
    """True at the records that the mixture takes, those with the smallest hashes of each source.

    They stay where they stand: a training shuffles them.
    """
    numbers = [int(np.sum(sources == i)) for i in range(len(weights))]
    marks = np.zeros(len(sources), bool)
    ordered = scrambled(hashes, seed)
    for source, count in enumerate(num_drawn(weights, numbers, seed)):
        mine = sources == source
        marks[mine] = smallest(ordered[mine], count)
    return marks
