"""Which records of the pool stay, and in which split: made splits, duplicates, leaks, mixture, subset."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capas.dataset.flaws import DROP, ERROR, KEEP, NUM_EXAMPLES
from capas.dataset.mix import drawn
from capas.dataset.pool import Pool
from capas.dataset.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    leaks,
    ordinals,
    scrambled,
    shares,
    smallest,
)
from capas.errors import CapasError
from capas.params import Params
from capas.records import SPLITS

Marks = NDArray[np.bool_]
DUPLICATE, LEAK, NOT_DRAWN, BEYOND = "duplicate", "leak", "not_drawn", "beyond_max_records"


@dataclass
class Selection:
    """`split` has the number of each record's split, `stays` says whether it is written."""

    pool: Pool
    split: NDArray[np.uint8]
    stays: Marks
    dropped: dict[str, Marks] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)

    def of(self, split: str) -> Marks:
        return self.stays & (self.split == SPLITS.index(split))

    def num_of(self, source: int) -> int:
        return int((self.stays & (self.pool["source"] == source)).sum())

    def drop(self, reason: str, marks: Marks) -> None:
        if marks.any():
            self.dropped[reason] = marks
            self.stays = self.stays & ~marks

    def facts(self) -> dict[str, Any]:
        """{reason: count and examples}; a subset and a mixture need no examples."""
        named = {
            reason: marks for reason, marks in self.dropped.items() if reason in (DUPLICATE, LEAK)
        }
        return {
            reason: {
                "count": int(marks.sum()),
                "examples": self.pool.examples(np.flatnonzero(marks)[:NUM_EXAMPLES])
                if reason in named
                else [],
            }
            for reason, marks in self.dropped.items()
        }


def select_records(
    pool: Pool, dataset: Params, given: Sequence[set[str]], weights: Sequence[float | None]
) -> Selection:
    """Decide for every record.

    Args:
        given: the splits that each source has of its own; the others are made of its train records.
        weights: of each source, or None for all of them.

    Raises:
        CapasError: duplicates or leaks where they are an error, more leaks than the budget, an empty split.
    """
    selection = Selection(pool, _made(pool, dataset, given), np.ones(len(pool), bool))
    _duplicates(selection, dataset.duplicates)
    _leaks(selection, dataset.leaks, dataset.leak_budget_fraction)
    _mixture(selection, [w for w in weights if w is not None], dataset.seed)
    if dataset.max_records is not None:
        _subset(selection, dataset.max_records, dataset.seed)
    _check_splits(selection)
    return selection


def _made(pool: Pool, dataset: Params, given: Sequence[set[str]]) -> NDArray[np.uint8]:
    splits: NDArray[np.uint8] = pool["split"].copy()
    for source, names in enumerate(given):
        mine = (pool["source"] == source) & (splits == TRAIN)
        test = 0.0 if SPLITS[TEST] in names else dataset.test_fraction
        validation = 0.0 if SPLITS[VALIDATION] in names else dataset.validation_fraction
        splits[mine] = shares(pool["group"][mine], validation, test, dataset.seed)
    return splits


def _duplicates(selection: Selection, policy: str) -> None:
    """Exact copies within a split, the first of them stays; a copy in another split is a leak."""
    pool, marks = selection.pool, np.zeros(len(selection.pool), bool)
    for split in range(len(SPLITS)):
        mine = selection.split == split
        marks[mine] = ordinals(pool["content"][mine]) > 0
    _apply(selection, policy, DUPLICATE, marks, lambda i: pool["content"] == pool["content"][i])


def _leaks(selection: Selection, policy: str, budget_fraction: float) -> None:
    pool, stays = selection.pool, selection.stays
    marks = np.zeros(len(pool), bool)
    marks[stays] = leaks(pool["prompt"][stays], selection.split[stays])
    num_leaks, num_judged = int(marks.sum()), int((stays & (selection.split != TEST)).sum())
    if policy == DROP and num_leaks > budget_fraction * num_judged:
        raise CapasError(
            f"{num_leaks} of {num_judged} records of train and validation have the prompt of a record in "
            f"test or validation, more than dataset.leak_budget_fraction={budget_fraction:g} allows to drop; "
            f"the first: {pool.location(int(marks.argmax()))}. Raise the budget to at least "
            f"{num_leaks / num_judged:.6g}"
        )
    _apply(selection, policy, LEAK, marks, lambda i: pool["prompt"] == pool["prompt"][i])


def _apply(
    selection: Selection, policy: str, reason: str, marks: Marks, like: Callable[[int], Marks]
) -> None:
    if policy == ERROR and marks.any():
        index = int(marks.argmax())
        others = np.flatnonzero(like(index) & selection.stays)
        other = int(next(i for i in others if i != index))
        raise CapasError(
            f"{int(marks.sum())} records are a {reason}, the first: {selection.pool.location(index)} is like "
            f"{selection.pool.location(other)}. Take it out, or set dataset.{reason}s to drop or keep"
        )
    if policy == KEEP and marks.any():
        selection.kept[reason] = int(marks.sum())
    if policy == DROP:
        selection.drop(reason, marks)


def _mixture(selection: Selection, weights: Sequence[float], seed: int) -> None:
    """Of train alone: validation and test keep all that their sources have."""
    if not weights:
        return
    train = np.flatnonzero(selection.of(SPLITS[TRAIN]))
    taken = drawn(selection.pool["source"][train], selection.pool["content"][train], weights, seed)
    marks = np.zeros(len(selection.pool), bool)
    marks[train[~taken]] = True
    selection.drop(NOT_DRAWN, marks)


def _subset(selection: Selection, max_records: int, seed: int) -> None:
    """Of all splits together, so that their shares stay about the same."""
    stays = np.flatnonzero(selection.stays)
    taken = smallest(scrambled(selection.pool["content"][stays], seed), max_records)
    marks = np.zeros(len(selection.pool), bool)
    marks[stays[~taken]] = True
    selection.drop(BEYOND, marks)


def _check_splits(selection: Selection) -> None:
    counts = {split: int(selection.of(split).sum()) for split in SPLITS}
    empty = [split for split, count in counts.items() if not count]
    if empty:
        key = "max_records" if BEYOND in selection.dropped else f"{empty[0]}_fraction"
        raise CapasError(
            f"no record is left for {' and '.join(empty)} of {sum(counts.values())}: "
            "every split needs some. Give a file of its own in dataset.data_files, or raise dataset."
            + key.replace("train_fraction", "max_records")
        )
