"""Near-duplicate questions, and splits that keep them together."""

import numpy as np
import pytest

from capas.dataset.similar import similar_groups
from capas.dataset.splits import TEST, TRAIN, VALIDATION, cluster_shares, digest, num_test_records
from capas.evaluation.power import power_in_words, records_for, smallest_difference

SIMILARITY = 0.6


def are_similar(one: str, other: str) -> bool:
    labels = similar_groups([one, other], SIMILARITY).labels
    return bool(labels[0] == labels[1])


@pytest.mark.parametrize(
    ("one", "other", "similar"),
    [
        ("Where is my order 4711?", "where is my ORDER 9", True),
        ("My name is Ana and I was charged 41 EUR", "My name is Bob and I was charged 3 EUR", True),
        ("¿Dónde está mi pedido 12?", "¿Donde está mi pedido 4?", True),
        ("How do I reset my password?", "Where is my order 4711?", False),
        ("My card was declined yesterday", "My parcel was delivered yesterday", False),
        ("", "", True),
        ("", "a", False),
    ],
)
def test_two_questions_are_nearly_the_same_or_not(one: str, other: str, similar: bool) -> None:
    assert are_similar(one, other) is similar


def test_a_chain_of_near_duplicates_is_one_group() -> None:
    texts = [
        "alpha beta gamma delta",
        "alpha beta gamma delta epsilon",
        "zeta",
        "alpha beta gamma delta",
    ]
    groups = similar_groups(texts, SIMILARITY)
    assert groups.labels.tolist() == [0, 0, 1, 0]
    assert groups.sizes.tolist() == [3, 3, 1, 3]


def test_an_instruction_that_opens_every_question_makes_no_duplicates() -> None:
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrt"]
    opening = "Classify the sentiment of the following customer review as positive or negative: "
    texts = [f"{opening}{word} {word[::-1]}" for word in words]
    assert similar_groups(texts, SIMILARITY).sizes.max() == 1


def test_clusters_stay_together_and_fill_the_splits() -> None:
    labels = np.arange(300) // 3
    content = np.array([digest(str(i)) for i in range(300)], np.uint64)
    splits = cluster_shares(labels, content, 15, 60, seed=0)
    assert [int((splits == s).sum()) for s in (TRAIN, VALIDATION, TEST)] == [225, 15, 60]
    assert all(len(set(splits[labels == label])) == 1 for label in range(100))
    assert (splits != cluster_shares(labels, content, 15, 60, seed=1)).any()
    order = np.random.default_rng(0).permutation(300)
    assert (cluster_shares(labels[order], content[order], 15, 60, seed=0) == splits[order]).all()


def test_a_cluster_that_is_too_large_goes_to_training() -> None:
    labels = np.array([0] * 80 + list(range(1, 21)))
    content = np.array([digest(str(i)) for i in range(100)], np.uint64)
    splits = cluster_shares(labels, content, 5, 15, seed=0)
    assert set(splits[:80]) == {TRAIN}
    assert (splits == TEST).sum() == 15 and (splits == VALIDATION).sum() == 5


@pytest.mark.parametrize(
    ("num_records", "fraction", "expected"),
    [(300, None, 60), (5000, None, 100), (10, None, 2), (300, 0.05, 15), (300, 0.0, 0)],
)
def test_a_test_split_has_a_fifth_of_the_records_at_most_100(
    num_records: int, fraction: float | None, expected: int
) -> None:
    assert num_test_records(num_records, fraction) == expected


def test_few_test_records_show_large_differences_alone() -> None:
    assert smallest_difference(100) == pytest.approx(0.14, abs=0.001)
    assert smallest_difference(records_for(0.05)) == pytest.approx(0.05, rel=1e-3)
    assert power_in_words(60) == (
        "60 test records: a difference below about 18 points cannot be shown; about 785 would show one of 5"
    )
    assert power_in_words(1000).endswith("below about 4 points cannot be shown")
