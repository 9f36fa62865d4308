"""Splits by hashes, duplicates, leaks, subsets and mixtures, as functions of digests."""

import numpy as np
import pytest

from capas.dataset.mix import drawn, num_drawn
from capas.dataset.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    content_digest,
    digest,
    leaks,
    normalised,
    ordinals,
    prompt_digests,
    scrambled,
    shares,
    smallest,
)

DIGESTS = np.array([digest(str(n)) for n in range(20_000)], np.uint64)


def say(*contents: str) -> list[dict[str, object]]:
    roles = ("user", "assistant")
    turns = enumerate(contents)
    return [{"role": roles[i % 2], "content": c, "extra": "", "train": True} for i, c in turns]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2?", "what is 2"),
        ("cafe\u0301 ﬁn", "CAFÉ fin"),
        ("a  b\n", "ab"),
        ("¿Qué?", "qué"),
        ("Straße", "STRASSE"),
    ],
)
def test_texts_that_differ_in_form_alone_are_the_same(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("año", "ano"), ("2 apples", "3 apples"), ("की", "का"), ("?", "!"), ("", "?")],
)
def test_texts_that_differ_in_letters_are_different(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_a_digest_is_of_texts_with_their_bounds() -> None:
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("a\0") != digest("a")


def test_the_content_counts_and_nothing_else() -> None:
    record = {"id": "a", "messages": say("Hi", "Hello"), "tools": "", "metadata": "{}"}
    other = {**record, "id": "b", "metadata": '{"a": 1}'}
    assert content_digest(record) == content_digest(other)
    for changed in (say("Hi ", "Hello"), say("Hi", "Hello", "?")):
        assert content_digest({**record, "messages": changed}) != content_digest(record)
    untrained = [{**m, "train": m["role"] != "assistant"} for m in say("Hi", "Hello")]
    assert content_digest({**record, "messages": untrained}) != content_digest(record)


def test_a_thread_belongs_to_the_group_of_its_first_question() -> None:
    group, prompt = prompt_digests(say("Hi!", "Hello", "Why?", "So"))
    assert group == prompt_digests(say("hi", "Bye"))[0]
    assert prompt == prompt_digests(say("hi", "hello.", "why", "No"))[1]
    assert prompt != prompt_digests(say("hi", "hello", "who", "No"))[1]
    assert len(set(prompt_digests(say("hi", "Bye")))) == 1
    assert prompt_digests(say("a", "b")[1:]) != prompt_digests(say("a", "c")[1:])


def test_shares_are_about_those_asked_for_and_move_with_the_seed() -> None:
    splits = shares(DIGESTS, 0.1, 0.2, seed=0)
    counts = [np.mean(splits == s) for s in (TRAIN, VALIDATION, TEST)]
    assert np.allclose(counts, (0.7, 0.1, 0.2), atol=0.01)
    assert (splits != shares(DIGESTS, 0.1, 0.2, seed=1)).any()
    assert (shares(DIGESTS, 0.0, 0.0, seed=0) == TRAIN).all()


def test_another_record_moves_none() -> None:
    splits = shares(DIGESTS[1:], 0.1, 0.2, seed=3)
    assert (shares(DIGESTS, 0.1, 0.2, seed=3)[1:] == splits).all()


def test_seeds_give_different_orders() -> None:
    orders = [np.argsort(scrambled(DIGESTS, seed)) for seed in (0, 1, 2**31)]
    assert (orders[0] != orders[1]).mean() > 0.99
    assert (orders[1] != orders[2]).mean() > 0.99
    assert len(np.unique(scrambled(DIGESTS, 7))) == len(DIGESTS)


def test_ordinals_count_what_stood_before() -> None:
    assert ordinals(np.array([5, 3, 5, 5, 3], np.uint64)).tolist() == [0, 0, 1, 2, 1]
    assert ordinals(np.array([], np.uint64)).tolist() == []


def test_a_leak_is_a_prompt_of_a_later_split() -> None:
    prompts = np.array([1, 2, 3, 4, 2, 3, 3, 4], np.uint64)
    splits = np.array([TRAIN] * 4 + [VALIDATION] * 2 + [TEST] * 2, np.uint8)
    leaked = [False, True, True, True, False, True, False, False]
    assert leaks(prompts, splits).tolist() == leaked


def test_a_subset_hardly_moves_as_the_set_grows() -> None:
    hashes = scrambled(DIGESTS, 0)
    small = set(DIGESTS[:-1][smallest(hashes[:-1], 500)].tolist())
    large = set(DIGESTS[smallest(hashes, 500)].tolist())
    assert len(small) == len(large) == 500
    assert len(small - large) <= 1


def test_a_mixture_stops_when_a_source_is_used_up() -> None:
    numbers = num_drawn([3, 1], [600, 10_000], seed=0)
    assert numbers[0] == 600
    assert 150 < numbers[1] < 250
    assert num_drawn([0.5, 0.5], [10**6, 3], seed=0)[1] == 3
    assert num_drawn([1.0], [200_000], seed=0) == [200_000]


def test_a_mixture_is_that_of_interleave_datasets_in_its_numbers() -> None:
    from datasets import Dataset, interleave_datasets

    sets = [Dataset.from_dict({"s": [i] * n}) for i, n in enumerate((400, 900))]
    mixed = interleave_datasets(sets, probabilities=[0.25, 0.75], seed=1)
    theirs, ours = mixed["s"].count(1) / len(mixed), num_drawn([1, 3], [400, 900], seed=1)
    assert abs(ours[1] / sum(ours) - theirs) < 0.05


def test_a_mixture_takes_a_seeded_choice_of_each_source() -> None:
    sources = np.repeat([0, 1], 10_000)
    marks = drawn(sources, DIGESTS, [1, 4], seed=0)
    assert marks[sources == 1].all()
    assert abs(marks[sources == 0].sum() - 2500) < 200
    assert marks[sources == 0][:5000].sum() > 1000
    assert (marks != drawn(sources, DIGESTS, [1, 4], seed=1)).any()
