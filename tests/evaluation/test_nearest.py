"""The answers that could have been copied, and the values that an answer copies from its prompt."""

import pytest

from capas.evaluation.copied import copied_values
from capas.evaluation.nearest import distance_group, nearest_prompts

TRAIN = [
    "Where is my order 4711?",
    "How do I reset my password?",
    "¿Dónde está mi pedido 4711?",
    "我的订单在哪里?",
]


@pytest.mark.parametrize(
    ("prompt", "index", "group"),
    [
        ("Where is my order 4711?", 0, "twin"),
        ("where is my order 9?", 0, "near"),
        ("How can I reset the password of my account?", 1, "far"),
        ("¿Dónde está el pedido 12?", 2, "near"),
        ("我的订单呢?", 3, "far"),
        ("Do you ship to Canada?", None, "far"),
    ],
)
def test_the_most_similar_training_prompt_is_found(
    prompt: str, index: int | None, group: str
) -> None:
    (found,) = nearest_prompts([prompt], TRAIN)
    assert distance_group(found.similarity) == group
    assert index is None or found.index == index


def test_a_training_prompt_is_its_own_twin_and_of_equal_ones_the_first_counts() -> None:
    found = nearest_prompts([*TRAIN, ""], [*TRAIN, *TRAIN])
    assert [n.index for n in found[:4]] == [0, 1, 2, 3]
    assert [n.similarity for n in found[:4]] == [1.0] * 4


def test_many_prompts_are_searched_in_parts() -> None:
    train = [f"question number {i}" for i in range(700)]
    assert [n.index for n in nearest_prompts(train, train)] == list(range(700))


def test_without_training_prompts_there_is_nothing_to_copy() -> None:
    with pytest.raises(ValueError, match="no training prompt"):
        nearest_prompts(["a"], [])


CHARGED = 'My name is Ana Ruiz and I was charged 41 EUR for "Pro plan".'
REFUND = "Ana, we refund 41 EUR."


@pytest.mark.parametrize(
    ("completion", "reference", "prompt", "right"),
    [
        (REFUND, REFUND, CHARGED, True),
        ("We refund 41 EUR, Ana.", REFUND, CHARGED, True),
        ("Ana, we refund 3 EUR.", REFUND, CHARGED, False),
        ("Ana, we refund 410 EUR.", REFUND, CHARGED, False),
        ("Ana, we refund 41.50 EUR.", REFUND, CHARGED, False),
        ("We refund 41 EUR.", REFUND, CHARGED, False),
        ("It is done.", "It is done.", CHARGED, None),
        ('{"plan": "Basic"}', '{"plan": "Pro plan"}', CHARGED, False),
        ('{"plan": "Pro plan"}', '{"plan": "Pro plan"}', CHARGED, True),
        ("A las 7:30.", "Alarma a las 7:30.", "Despiértame a las 7:30", True),
        ("A las 7:35.", "Alarma a las 7:30.", "Despiértame a las 7:30", False),
        ("Hello.", "Hello there.", "Hello. There is a problem", None),
        ("", "", "", None),
    ],
)
def test_an_answer_has_the_values_of_its_prompt_or_not(
    completion: str, reference: str, prompt: str, right: bool | None
) -> None:
    assert copied_values(completion, reference, prompt) is right
