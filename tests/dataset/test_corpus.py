"""The pretraining corpus holds neither the task nor a held-out value."""

import json
import re
from functools import cache

from capas.dataset.task import phrases
from capas.dataset.task.calls import generate_conversations, generate_records
from capas.dataset.task.corpus import (
    CHAT_SHARES,
    DOCUMENT_SHARES,
    Document,
    generate_corpus,
    render_chat,
)
from capas.dataset.task.pretraining import SPECIAL_TOKENS
from capas.dataset.task.values import is_held_out
from capas.dataset.task.words import WORDS

SPOKEN = r"[\w:]*\w"  # a word, a number, a time


@cache
def documents() -> tuple[Document, ...]:
    return tuple(generate_corpus(0, 12_000))


@cache
def words_of_corpus() -> frozenset[str]:
    """Runs of letters, digits and colons, in lower case: the words, numbers and times of the corpus."""
    texts = (document.render().casefold() for document in documents())
    return frozenset(word for text in texts for word in re.findall(SPOKEN, text))


def test_the_same_seed_gives_the_same_corpus():
    assert list(generate_corpus(4, 200)) == list(generate_corpus(4, 200))
    assert list(generate_corpus(4, 200)) != list(generate_corpus(5, 200))


def test_every_kind_of_document_and_chat_format_occurs():
    assert {document.kind for document in documents()} == set(DOCUMENT_SHARES)
    assert {document.chat for document in documents() if document.messages} == set(CHAT_SHARES)


def test_no_function_of_the_task_is_named():
    names = "|".join(phrases.FUNCTIONS)
    assert not [d for d in documents() if re.search(rf"{names}|arguments", d.render())]


def test_no_json_key_of_the_task_occurs():
    keys = {slot for slots in phrases.FUNCTIONS.values() for slot in slots} | {"name"}
    found = {key for d in documents() for key in re.findall(r'"(\w+)": ', d.render())}
    assert found and found.isdisjoint(keys)


def test_no_request_is_answered_with_json():
    replies = [d for d in documents() if d.kind == "reply"]
    answers = [m["content"] for d in replies for m in d.messages if m["role"] == "assistant"]
    assert len(answers) > 4000 and not [text for text in answers if "{" in text]


def test_no_call_of_the_task_occurs():
    records = generate_records(0, 500, 0, 20)
    calls = {r["messages"][-1]["content"] for split in records.values() for r in split}
    arguments = {json.dumps(json.loads(call)["arguments"], ensure_ascii=False) for call in calls}
    texts = "\n".join(d.render() for d in documents() if d.kind == "record")
    assert len(arguments) > 500 and not [text for text in arguments if text in texts]


def test_no_held_out_number_or_time_occurs():
    words = {word for word in words_of_corpus() if word.replace(":", "").isdigit()}
    padded = {word.zfill(5) if ":" in word else word for word in words}
    assert len(padded) > 500 and not [word for word in padded if is_held_out(word)]


def test_no_held_out_word_occurs():
    atoms = {word for languages in WORDS.values() for words in languages.values() for word in words}
    held_out = {word.casefold() for word in atoms if is_held_out(word)}
    assert len(held_out) > 50 and not held_out & words_of_corpus()


def test_no_held_out_value_of_the_task_occurs():
    drawn = generate_conversations(0, num_train=0, num_validation=0, num_test_per_kind=60)
    held_out = [told for _, kind, told in drawn if kind in ("values", "both")]
    values = {str(value).casefold() for told in held_out for value in told.values}
    text = " ".join(re.findall(SPOKEN, "\n".join(d.render() for d in documents()).casefold()))
    spoken = {" ".join(re.findall(SPOKEN, value)) for value in values}
    assert len(values) > 80 and not [value for value in spoken if f" {value} " in text]


def test_contents_hold_no_control_token():
    contents = [m["content"] for d in documents() for m in d.messages]
    assert not [text for text in contents if any(token in text for token in SPECIAL_TOKENS)]


def test_the_system_text_opens_the_first_user_turn_where_a_family_has_no_system_role():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    messages.append({"role": "assistant", "content": "A"})
    assert render_chat(messages, "mistral") == "<bos>[INST] S\n\nU[/INST] A<eos>"
    assert render_chat(messages, "gemma").startswith(
        "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n"
    )
