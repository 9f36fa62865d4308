"""Select the records of the pool and assign splits: made splits, duplicates, leaks, mixture, subset."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.records import SPLITS
from capas.dataset.flaws import DROP, ERROR, KEEP, NUM_EXAMPLES
from capas.dataset.mix import drawn
from capas.dataset.pool import Pool
from capas.dataset.similar import MAX_RECORDS, Groups, similar_groups
from capas.dataset.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    cluster_shares,
    leaks,
    num_test_records,
    ordinals,
    scrambled,
    shares,
    smallest,
)

log = logging.getLogger("capas")
Marks = NDArray[np.bool_]
CLUSTER, NUM_PAIRS = "cluster", 5
DUPLICATE, LEAK, NOT_DRAWN, BEYOND = "duplicate", "leak", "not_drawn", "beyond_max_records"


@dataclass
class Selection:
    """The selected records: `split` has the number of each record's split, `stays` whether it is written."""

    pool: Pool
    split: NDArray[np.uint8]
    stays: Marks
    dropped: dict[str, Marks] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    twins: dict[str, Callable[[int], Marks]] = field(default_factory=dict)
    groups: Groups | None = None

    def of(self, split: str) -> Marks:
        return self.stays & (self.split == SPLITS.index(split))

    def num_of(self, source: int) -> int:
        return int((self.stays & (self.pool["source"] == source)).sum())

    def drop(self, reason: str, marks: Marks) -> None:
        if marks.any():
            self.dropped[reason] = marks
            self.stays = self.stays & ~marks

    def facts(self) -> dict[str, Any]:
        """Return {reason: count and examples} of dropped records; a subset and a mixture have no examples."""
        return {
            reason: {"count": int(marks.sum()), "examples": self._examples(reason, marks)}
            for reason, marks in self.dropped.items()
        }

    def near_duplicates(self) -> dict[str, Any] | None:
        """Return counts and examples of selected records with near-duplicates, or None without a search.

        `num_test_records_like_train` counts test records with a near-duplicate in train.
        """
        if self.groups is None:
            return None
        labels, train = self.groups.labels, self.of(SPLITS[TRAIN])
        kept = labels[self.stays]
        sizes = np.bincount(kept, minlength=len(labels))
        across = self.of(SPLITS[TEST]) & np.isin(labels, labels[train])
        return {
            "num_records": int((sizes[kept] > 1).sum()),
            "num_groups": int((sizes > 1).sum()),
            "largest_group": int(sizes.max(initial=0)),
            "num_test_records_like_train": int(across.sum()),
            "examples": self._pairs(across if across.any() else self.stays & (sizes[labels] > 1)),
        }

    def _pairs(self, marks: Marks) -> list[dict[str, Any]]:
        """Return the first records of `marks`, each with the place of another record in its group."""
        assert self.groups is not None
        labels, whys = self.groups.labels, {}
        for index in np.flatnonzero(marks)[:NUM_PAIRS].tolist():
            others = (labels == labels[index]) & self.stays
            others[index] = False
            if others.any():
                whys[index] = f"near-duplicate of {self.pool.location(int(others.argmax()))}"
        return self.pool.examples(whys)

    def _examples(self, reason: str, marks: Marks) -> list[dict[str, Any]]:
        if reason not in self.twins:
            return []
        first = [int(index) for index in np.flatnonzero(marks)[:NUM_EXAMPLES]]
        return self.pool.examples({index: f"like {self.twin(reason, index)}" for index in first})

    def twin(self, reason: str, index: int) -> str:
        """Return the place of the record that this one is a copy of, or whose prompt it shares."""
        return self.pool.location(int(self.twins[reason](index).argmax()))


def select_records(
    pool: Pool, dataset: Params, given: Sequence[set[str]], weights: Sequence[float | None]
) -> Selection:
    """Return the selection: for every record its split, and whether it is written.

    Args:
        given: the splits that each source provides; the others are made from its train records.
        weights: the weight of each source, or None for all of them.

    Raises:
        CapasError: there are duplicates or leaks and their policy is error; there are more leaks than the
            budget allows; a split is empty; or there are too many records for split_by=cluster.
    """
    groups = _near_duplicates(pool, dataset)
    selection = Selection(pool, _made(pool, dataset, given, groups), np.ones(len(pool), bool))
    selection.groups = groups
    _duplicates(selection, dataset.duplicates)
    _leaks(selection, dataset.leaks, dataset.leak_budget_fraction)
    _mixture(selection, [w for w in weights if w is not None], dataset.seed)
    if dataset.max_records is not None:
        _subset(selection, dataset.max_records, dataset.seed)
    _check_splits(selection, dataset.split_by)
    return selection


def _near_duplicates(pool: Pool, dataset: Params) -> Groups | None:
    """Return the groups of near-duplicate questions, or None if not configured or with too many records.

    Raises:
        CapasError: there are too many records, and the splits need the groups.
    """
    if dataset.near_duplicate_similarity is None:
        return None
    if len(pool) > MAX_RECORDS:
        if dataset.split_by == CLUSTER:
            raise CapasError(
                "dataset.split_by=cluster compares all questions and supports at most "
                f"{MAX_RECORDS} records, but there are {len(pool)}. Set split_by: prompt, or name a "
                "test file in dataset.data_files"
            )
        log.info("near-duplicates are not searched: more than %d records", MAX_RECORDS)
        return None
    return similar_groups(list(pool.questions()), dataset.near_duplicate_similarity)


def _made(
    pool: Pool, dataset: Params, given: Sequence[set[str]], groups: Groups | None
) -> NDArray[np.uint8]:
    splits: NDArray[np.uint8] = pool["split"].copy()
    for source, names in enumerate(given):
        mine = (pool["source"] == source) & (splits == TRAIN)
        count = int(mine.sum())
        test = 0.0 if SPLITS[TEST] in names else dataset.test_fraction
        validation = 0.0 if SPLITS[VALIDATION] in names else dataset.validation_fraction
        num_test = num_test_records(count, test)
        if groups is not None and dataset.split_by == CLUSTER:
            _, labels = np.unique(groups.labels[mine], return_inverse=True)
            wanted = math.ceil(validation * count), num_test
            splits[mine] = cluster_shares(labels, pool["content"][mine], *wanted, dataset.seed)
        else:
            fraction = num_test / max(1, count) if test is None else test
            splits[mine] = shares(pool["group"][mine], validation, fraction, dataset.seed)
    return splits


def _duplicates(selection: Selection, policy: str) -> None:
    """Apply the policy to exact copies within a split, except the first; a copy across splits is a leak."""
    content, split = selection.pool["content"], selection.split
    marks = np.zeros(len(content), bool)
    for number in range(len(SPLITS)):
        mine = split == number
        marks[mine] = ordinals(content[mine]) > 0
    selection.twins[DUPLICATE] = lambda i: (content == content[i]) & (split == split[i])
    _apply(selection, policy, DUPLICATE, marks)


def _leaks(selection: Selection, policy: str, budget_fraction: float) -> None:
    prompt, split, stays = selection.pool["prompt"], selection.split, selection.stays
    marks = np.zeros(len(prompt), bool)
    marks[stays] = leaks(prompt[stays], split[stays])
    selection.twins[LEAK] = lambda i: (prompt == prompt[i]) & (split > split[i]) & stays
    num_leaks, num_judged = int(marks.sum()), int((stays & (split != TEST)).sum())
    if policy == DROP and num_leaks > budget_fraction * num_judged:
        raise CapasError(
            f"{num_leaks} of {num_judged} records of train and validation have the prompt of a record in "
            f"test or validation, more than dataset.leak_budget_fraction={budget_fraction:g} allows to drop; "
            f"{_first(selection, LEAK, marks)}. Raise the budget to at least {num_leaks / num_judged:.6g}"
        )
    _apply(selection, policy, LEAK, marks)


def _apply(selection: Selection, policy: str, reason: str, marks: Marks) -> None:
    if policy == ERROR and marks.any():
        raise CapasError(
            f"{int(marks.sum())} records are a {reason}, {_first(selection, reason, marks)}. Take it out, or "
            f"set dataset.{reason}s to drop or keep"
        )
    if policy == KEEP and marks.any():
        selection.kept[reason] = int(marks.sum())
    if policy == DROP:
        selection.drop(reason, marks)


def _first(selection: Selection, reason: str, marks: Marks) -> str:
    index = int(marks.argmax())
    return f"the first: {selection.pool.location(index)} is like {selection.twin(reason, index)}"


def _mixture(selection: Selection, weights: Sequence[float], seed: int) -> None:
    """Draw the mixture from train only; validation and test keep all records of their sources."""
    if not weights:
        return
    train = np.flatnonzero(selection.of(SPLITS[TRAIN]))
    taken = drawn(selection.pool["source"][train], selection.pool["content"][train], weights, seed)
    marks = np.zeros(len(selection.pool), bool)
    marks[train[~taken]] = True
    selection.drop(NOT_DRAWN, marks)


def _subset(selection: Selection, max_records: int, seed: int) -> None:
    """Draw a subset from all splits together, so that their proportions stay about the same."""
    stays = np.flatnonzero(selection.stays)
    taken = smallest(scrambled(selection.pool["content"][stays], seed), max_records)
    marks = np.zeros(len(selection.pool), bool)
    marks[stays[~taken]] = True
    selection.drop(BEYOND, marks)


def _check_splits(selection: Selection, split_by: str) -> None:
    counts = {split: int(selection.of(split).sum()) for split in SPLITS}
    empty = [split for split, count in counts.items() if not count]
    if empty and selection.groups is not None and split_by == CLUSTER:
        largest = int(selection.groups.sizes.max(initial=0))
        if largest > max(1, sum(counts.values()) / 2):
            raise CapasError(
                f"no record is left for {' and '.join(empty)}: {largest} of {len(selection.pool)} "
                "records are near-duplicates, and dataset.split_by=cluster keeps them in one "
                "split. Set split_by: prompt, or raise dataset.near_duplicate_similarity"
            )
    if empty:
        key = "max_records" if BEYOND in selection.dropped else f"{empty[0]}_fraction"
        raise CapasError(
            f"no record is left for {' and '.join(empty)} of {sum(counts.values())}: "
            "every split needs some. Give a file of its own in dataset.data_files, or raise dataset."
            + key.replace("train_fraction", "max_records")
        )
