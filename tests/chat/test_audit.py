"""The audit of formatted records: what is wrong in them stops the stage, whoever made them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import say, template_text
from test_columns import batch

from capas.chat.audit import Audit
from capas.chat.batch import Formatted
from capas.chat.format import ChatFormat
from capas.chat.formatting import Refused, SplitFormatter
from capas.chat.overflow import Overflow
from capas.core.errors import CapasError
from capas.core.ragged import Ragged

CONVERSATIONS = [say("How are you?", "Fine."), say("a", "b", "c", "d", system="Be brief.")]


@pytest.fixture
def chat(tiny_tokenizer_dir: Path) -> ChatFormat:
    return ChatFormat.load(template_text("llama3"), tiny_tokenizer_dir, "")


@pytest.fixture
def formatted(chat: ChatFormat, tiny_tokenizer_dir: Path) -> Formatted:
    overflow = Overflow("train", 500, "error", 0.0, chat.end_token_ids)
    formatter = SplitFormatter("train", chat, "assistant", overflow, Refused("error", 0.0))
    (found,) = formatter.format([batch(CONVERSATIONS, tiny_tokenizer_dir).records])
    assert formatter.facts()["num_checked"] == 2
    return found


def changed(formatted: Formatted, **columns: Any) -> Formatted:
    return replace(formatted, columns=replace(formatted.columns, **columns))


def with_trained(formatted: Formatted, trained: np.ndarray[Any, Any]) -> Formatted:
    return changed(formatted, trained=Ragged(trained, formatted.columns.trained.offsets))


def test_what_is_right_passes(chat: ChatFormat, formatted: Formatted) -> None:
    audit = Audit(chat, "assistant")
    audit.check("train", formatted)
    assert audit.num_checked == 2


def test_a_record_without_loss(chat: ChatFormat, formatted: Formatted) -> None:
    nothing = with_trained(formatted, np.zeros_like(formatted.columns.trained.values))
    with pytest.raises(CapasError, match="train record '0': no token of the record is trained"):
        Audit(chat, "assistant").check("train", nothing)


def test_an_end_token_that_is_not_trained(chat: ChatFormat, formatted: Formatted) -> None:
    trained = formatted.columns.trained.values & (formatted.columns.ids.values != chat.end_token_id)
    with pytest.raises(CapasError, match="'0': a trained stretch ends without an end token"):
        Audit(chat, "assistant").check("train", with_trained(formatted, trained))


def test_a_user_token_that_is_trained(chat: ChatFormat, formatted: Formatted) -> None:
    trained = formatted.columns.trained.values.copy()
    first = int(np.flatnonzero(trained)[0])
    trained[first - 8 : first] = True
    with pytest.raises(
        CapasError, match=r"'0': the trained tokens decode to .* but the answers are 'Fine.'"
    ):
        Audit(chat, "assistant").check("train", with_trained(formatted, trained))


def test_two_beginnings_of_a_text(chat: ChatFormat, formatted: Formatted) -> None:
    ids = formatted.columns.ids.values.copy()
    ids[2] = chat.bos_token_id
    wrong = changed(formatted, ids=Ragged(ids, formatted.columns.ids.offsets))
    with pytest.raises(
        CapasError,
        match="'0': the number of bos_token differs from the rendered text",
    ):
        Audit(chat, "assistant").check("train", wrong)


def test_ids_that_are_not_those_of_the_rendered_text(
    chat: ChatFormat, formatted: Formatted
) -> None:
    columns = formatted.columns
    ids, asked = columns.ids.values.copy(), columns.prompts.values.copy()
    ids[4] += 1
    asked[4] += 1
    wrong = changed(
        formatted,
        ids=Ragged(ids, columns.ids.offsets),
        prompts=Ragged(asked, columns.prompts.offsets),
    )
    with pytest.raises(
        CapasError, match="'0': its ids differ from the ids of the rendered text from token 4"
    ):
        Audit(chat, "assistant").check("train", wrong)


@pytest.mark.parametrize("place", [0, 1])
def test_a_prompt_that_does_not_begin_its_record(
    place: int, chat: ChatFormat, formatted: Formatted
) -> None:
    asked = formatted.columns.prompts.values.copy()
    asked[formatted.columns.prompts.offsets[place + 1] - 1] += 1
    wrong = changed(formatted, prompts=Ragged(asked, formatted.columns.prompts.offsets))
    with pytest.raises(
        CapasError, match=f"'{place}': the prompt of its last answer is not a prefix"
    ):
        Audit(chat, "assistant").check("train", wrong)


def test_an_answer_that_is_not_trained_from_its_first_token_on(
    chat: ChatFormat, formatted: Formatted
) -> None:
    trained = formatted.columns.trained.values.copy()
    trained[len(formatted.columns.prompts.row(0))] = False
    with pytest.raises(CapasError, match="'0': training of its last answer does not begin"):
        Audit(chat, "assistant").check("train", with_trained(formatted, trained))


@pytest.mark.parametrize("count", [0, 1])
def test_refused_conversations_stay_within_the_budget(
    count: int, chat: ChatFormat, tiny_tokenizer_dir: Path
) -> None:
    gemma = ChatFormat.load(template_text("gemma"), tiny_tokenizer_dir, "")
    told = [
        say("a", "b"),
        *[say("a", "b", system="Gemma has no place for it.")] * count,
        say("c", "d"),
    ]
    for policy, budget, message in (
        ("error", 0.0, "To drop such records: chat_template.refused=drop"),
        ("drop", 0.1, "the chat template refuses 1 of 3 train records"),
        ("drop", 0.5, None),
    ):
        overflow = Overflow("train", 500, "error", 0.0, gemma.end_token_ids)
        refused = Refused(policy, budget)
        formatter = SplitFormatter("train", gemma, "assistant", overflow, refused)
        records = [batch(told, tiny_tokenizer_dir).records]
        if count and message:
            with pytest.raises(CapasError, match=message):
                list(formatter.format(records))
        else:
            (found,) = formatter.format(records)
            assert found.records.num_rows == 2
            assert (refused.count, len(refused.examples)) == (count, count)


def test_plain_text_is_trained_whole(chat: ChatFormat, tiny_tokenizer_dir: Path) -> None:
    told = [[{"role": "text", "content": "Once upon a time there was a fox."}]]
    overflow = Overflow("train", 500, "error", 0.0, chat.end_token_ids)
    formatter = SplitFormatter("train", chat, "assistant", overflow, Refused("error", 0.0))
    (found,) = formatter.format([batch(told, tiny_tokenizer_dir).records])
    (record,) = found.records.to_pylist()
    assert record["labels"][1:] == record["input_ids"][1:]
    rest = chat.decode(record["prompt_ids"][1:]) + record["reference"]
    assert rest == "Once upon a time there was a fox."
