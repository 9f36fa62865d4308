"""The general questions that ship with the repository, and those of one's own in their place."""

import json
from pathlib import Path

import pytest
from tiny import REPOSITORY, write_tokenizer

from capas.chat.format import ChatFormat
from capas.core.errors import CapasError
from capas.evaluation.general import format_questions

FILE = REPOSITORY / "data/general/records.jsonl"


@pytest.fixture(scope="module", params=["chatml", "llama3"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    folder = tmp_path_factory.mktemp("general") / "tokenizer"
    write_tokenizer(folder)
    template = (REPOSITORY / f"conf/chat_template/{request.param}.jinja").read_text()
    return ChatFormat.load(template, folder, "26 Jul 2024")


def test_exactly_the_answers_and_their_end_are_scored(chat: ChatFormat) -> None:
    records = format_questions(FILE, chat)
    assert len(records) == 40
    for record in records:
        scored = [label for label in record["labels"] if label != -100]
        assert chat.decode(scored) == record["reference"] + chat.end_token


def test_half_of_the_questions_are_spanish_and_none_comes_twice() -> None:
    lines = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    names = [line["id"] for line in lines]
    assert len(set(names)) == len({line["messages"][0]["content"] for line in lines}) == 40
    assert sum("-es-" in name for name in names) == sum("-en-" in name for name in names) == 20
    assert all([m["role"] for m in line["messages"]] == ["user", "assistant"] for line in lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not a conversation with id and messages: JSONDecodeError"),
        ('{"id": "a"}', "line 2 is not a conversation with id and messages: KeyError: 'messages'"),
        ("[]", "line 2 is not a conversation with id and messages: TypeError"),
        ('{"id": "a", "messages": []}', "line 2 is not a conversation.*IndexError"),
        (
            '{"id": "a", "messages": [{"role": "user", "content": "Hi"}]}',
            "line 2: .*nothing|line 2: .*answer",
        ),
    ],
)
def test_a_line_that_is_no_conversation_is_named(
    chat: ChatFormat, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(FILE.read_text(encoding="utf-8").splitlines()[0] + f"\n{line}\n")
    with pytest.raises(CapasError, match=message):
        format_questions(file, chat)


def test_an_empty_file_is_refused(chat: ChatFormat, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(CapasError, match=r"is empty\. Restore it"):
        format_questions(tmp_path / "records.jsonl", chat)
