"""Which parameters are shown as different, and which follow from others."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from shipped import CONF, composed

from capas.compare.changes import find_changes, texts_of


def changes(*overrides: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choices and keys that are shown for results with these overrides."""
    found = find_changes([texts_of(composed(words)) for words in overrides], CONF)
    return found.choices, found.keys


@pytest.mark.parametrize(
    ("one", "other", "choices", "keys"),
    [
        ([], ["lora.r=8"], (), ("lora.r",)),
        ([], ["seed=3"], (), ("seed",)),
        ([], ["lora=attention", "lora.r=8"], ("lora",), ("lora.r",)),
        ([], ["model=qwen2.5_0.5b_instruct"], ("model",), ()),
        ([], ["trainer.lr_scheduler_kwargs={a: 2}"], (), ("trainer.lr_scheduler_kwargs.a",)),
        ([], ["experiment=quick"], ("experiment",), ()),
        (["experiment=quick"], ["experiment=quick", "trainer.max_steps=5"], (), ("trainer.max_steps",)),
        ([], ["model=qwen2.5_0.5b_instruct", "chat_template=llama3"], ("model", "chat_template"), ()),
    ],
)  # fmt: skip
def test_what_follows_from_a_choice_is_not_shown(
    one: list[str], other: list[str], choices: tuple[str, ...], keys: tuple[str, ...]
) -> None:
    assert changes(one, other) == (choices, keys)


def test_nothing_is_hidden_that_conf_does_not_explain(tmp_path: Path) -> None:
    """The value of an option has changed since: the key is shown."""
    sides = [texts_of(composed()), {**texts_of(composed(["lora=attention"]))}]
    sides[1]["lora.target_modules"] = "['k_proj']"
    assert find_changes(sides, CONF).keys == ("lora.target_modules",)
    assert find_changes(sides, tmp_path / "gone").shown == ("lora.preset", "lora.target_modules")


def test_options_that_conf_no_longer_has_explain_nothing() -> None:
    sides = [texts_of(composed()), {**texts_of(composed()), "lora.preset": "old", "lora.r": "3"}]
    found = find_changes(sides, CONF)
    assert (found.choices, found.keys) == (("lora",), ("lora.r",))


def test_keys_that_a_row_lacks_do_not_count_where_that_is_said() -> None:
    sides = [{"a": "1", "b": "1"}, {"a": "2"}]
    assert find_changes(sides, CONF).keys == ("a", "b")
    assert find_changes(sides, CONF, partial=True).keys == ("a",)
