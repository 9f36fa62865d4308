"""The embedded task: a pure function of the seed, no leak between splits, every kind what it says."""

import json
from collections import Counter
from functools import cache
from random import Random

import pytest

from capas.dataset.task import phrases
from capas.dataset.task.calls import (
    COMBINATION_SORTS,
    KINDS,
    Conversation,
    generate_conversations,
    generate_records,
    normalise,
    write_call,
)
from capas.dataset.task.requests import Combination, draw_arguments
from capas.dataset.task.values import draw_value, is_held_out


@pytest.fixture
def rng() -> Random:
    return Random(0)


@cache
def conversations(split: str, kind: str) -> tuple[Conversation, ...]:
    drawn = generate_conversations(3, num_train=2500, num_validation=50, num_test_per_kind=80)
    return tuple(told for found, sort, told in drawn if (found, sort) == (split, kind))


def held_out_phrasings() -> set[str]:
    forms = [form for texts in phrases.PHRASINGS.values() for form in texts.values()]
    found = {text for form in forms for sides in form.values() for text in sides[1]}
    missing = [sides for _, texts in phrases.MISSING.values() for _, sides in texts.values()]
    found |= {text for sides in missing for text in sides[1]}
    return found | {text for sides in phrases.CORRECTIONS.values() for text in sides[1]}


def hold_values_out(told: Conversation) -> set[bool]:
    """Which side of the rule the numbers and times of a conversation are on."""
    plain = [str(value) for value in told.values]
    return {is_held_out(text) for text in plain if text.replace(":", "").isdigit()}


def test_the_same_seed_gives_the_same_records():
    assert generate_records(5, 40, 10, 4) == generate_records(5, 40, 10, 4)


def test_another_seed_gives_other_records():
    first, second = generate_records(5, 40, 10, 4), generate_records(6, 40, 10, 4)
    assert first["train"] != second["train"]


def test_a_longer_training_split_begins_with_the_shorter_one():
    assert generate_records(5, 60, 0, 0)["train"][:40] == generate_records(5, 40, 0, 0)["train"]


def test_counts_and_ids():
    records = generate_records(0, 30, 12, 5)
    assert [len(records[split]) for split in ("train", "validation", "test")] == [30, 12, 25]
    ids = [record["id"] for split in records.values() for record in split]
    assert len(set(ids)) == len(ids)
    kinds = Counter(record["metadata"]["kind"] for record in records["test"])
    assert kinds == dict.fromkeys(KINDS, 5)


def test_no_conversation_twice():
    drawn = generate_conversations(1, num_train=1500, num_validation=200, num_test_per_kind=60)
    texts = [normalise(told) for _, _, told in drawn]
    assert len(set(texts)) == len(texts) == 2000


def test_conversations_open_with_the_system_message_and_end_with_a_call():
    for told in conversations("train", "seen"):
        roles = [message["role"] for message in told.messages]
        assert roles[0] == "system" and set(roles[1::2]) == {"user"}
        assert set(roles[2::2]) == {"assistant"} and len(roles) == (
            3 if told.turns == "single" else 5
        )
        call = json.loads(told.messages[-1]["content"])
        assert tuple(call["arguments"]) == phrases.FUNCTIONS[call["name"]]


def test_training_shows_every_function_language_and_turn():
    train = conversations("train", "seen")
    functions = Counter((told.function, told.language) for told in train)
    assert len(functions) == 2 * len(phrases.FUNCTIONS) and min(functions.values()) > 30
    assert {told.turns for told in train} == {"single", "ask", "fix"}


def test_training_shows_nothing_held_out():
    hidden = held_out_phrasings()
    for told in (*conversations("train", "seen"), *conversations("test", "seen")):
        assert hidden.isdisjoint(told.phrasings)
        assert hold_values_out(told) <= {False}
        assert not any(pair.held_out for pair in told.combinations)


@pytest.mark.parametrize("kind", ["values", "both"])
def test_values_of_a_held_out_kind_never_occur_in_training(kind):
    known = {str(value) for told in conversations("train", "seen") for value in told.values}
    held_out = [told for told in conversations("test", kind) if told.values]
    assert len(held_out) == 80
    assert known.isdisjoint(str(value) for told in held_out for value in told.values)


@pytest.mark.parametrize("kind", ["phrasings", "both"])
def test_phrasings_of_a_held_out_kind_are_all_held_out(kind):
    hidden = held_out_phrasings()
    for told in conversations("test", kind):
        assert hidden.issuperset(told.phrasings)


def test_held_out_combinations_join_what_training_shows_apart():
    train = conversations("train", "seen")
    firsts = {(pair.sort, pair.first) for told in train for pair in told.combinations}
    seconds = {(pair.sort, pair.second) for told in train for pair in told.combinations}
    known = {pair for told in train for pair in told.combinations}
    for told in conversations("test", "combinations"):
        pairs = [pair for pair in told.combinations if pair.held_out]
        assert pairs and known.isdisjoint(pairs)
        assert all((p.sort, p.first) in firsts and (p.sort, p.second) in seconds for p in pairs)


def test_every_sort_of_combination_is_tested():
    drawn = conversations("test", "combinations")
    sorts = Counter(pair.sort for told in drawn for pair in told.combinations if pair.held_out)
    assert set(sorts) == set(COMBINATION_SORTS) and min(sorts.values()) > 15


def test_the_hold_out_rule_does_not_depend_on_the_seed_of_the_process():
    words = ["Ana", "ana", "07:30", "42", "guitar"]
    assert [is_held_out(word) for word in words] == [True, True, True, False, True]
    assert not Combination("currencies", "USD", "EUR").held_out


@pytest.mark.parametrize("held_out", [False, True])
def test_numbers_and_times_keep_to_their_side(held_out, rng):
    for slot in ("minutes", "percent", "amount", "time"):
        drawn = {str(draw_value(rng, slot, "en", held_out)) for _ in range(60)}
        assert len(drawn) > 10 and {is_held_out(value) for value in drawn} == {held_out}


def test_a_call_lists_its_arguments_in_the_order_of_the_function(rng):
    def draw(rng, slot, language):
        return draw_value(rng, slot, language, False)

    arguments = draw_arguments(rng, "create_event", "es", draw)
    shuffled = dict(sorted(arguments.items(), reverse=True))
    assert write_call("create_event", shuffled) == write_call("create_event", arguments)
