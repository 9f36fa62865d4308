import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import template_text
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from capas.chat.format import ChatFormat
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.evaluation.generation import complete, generation_config
from capas.use.chat import Talk
from capas.use.tuned_model import bounded

GENERATION = {
    "max_new_tokens": 12,
    "settings": {"greedy": {"do_sample": False}, "warm": {"do_sample": True, "temperature": 1.5}},
}


class Model:
    """A tiny tuned model as `capas.use.served_model.Served` holds it; what it was asked is kept."""

    def __init__(self, folder: Path, tokenizer: Path, multi_turn: bool) -> None:
        self.format = ChatFormat.load(template_text("chatml"), tokenizer, "")
        ids = {
            "stop_token_ids": self.format.stop_token_ids,
            "pad_token_id": self.format.pad_token_id,
        }
        self.chat = {"bos_token_id": None, **ids}
        self.facts = {"system": "Be brief.", "role": "user", "multi_turn": multi_turn}
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        self.model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).eval()
        self.tuned = SimpleNamespace(model=self.model, base=self._base)
        self.asked: list[list[dict[str, Any]]] = []
        self.tools: Any = None
        self.offered: Any = None
        encode = self.format.prompt_ids

        def prompt_ids(messages: Any, tools: Any = None) -> list[int]:
            self.asked.append(messages)
            self.offered = tools
            return encode(messages)  # the tiny template has no place for tools

        self.format.prompt_ids = prompt_ids  # type: ignore[method-assign]

    @contextmanager
    def _base(self) -> Iterator[Any]:
        with self.model.disable_adapter():
            yield self.model

    def answer(self, base: bool = False) -> str:
        """To the last conversation."""
        ids = ChatFormat.prompt_ids(self.format, self.asked[-1])
        config = generation_config(self.chat, GENERATION["max_new_tokens"])
        if base:
            with self.model.disable_adapter():
                found = complete(self.model, [ids], config, 1)
        else:
            found = complete(self.model, [ids], config, 1)
        return self.format.decode(found[0][0].input_ids)


@pytest.fixture
def model(tiny_model_dir: Path, tiny_tokenizer_dir: Path) -> Model:
    return Model(tiny_model_dir, tiny_tokenizer_dir, multi_turn=True)


def talk(model: Model, **options: Any) -> Talk:
    given = {"setting": None, "system": None, "max_new_tokens": None, "seed": 0, "history": False}
    given["tools"] = None
    source: Any = SimpleNamespace(params=Params({"generation": GENERATION}))
    return Talk(model, source, argparse.Namespace(**{**given, **options}))


def test_an_answer_is_written_and_kept(model: Model, capsys: Any) -> None:
    conversation = talk(model)
    assert conversation.hear("Hi\n")
    first = model.answer()
    assert first
    assert capsys.readouterr().out == f"{first}\n"
    assert conversation.hear("And now?")
    roles = [(message["role"], message["content"]) for message in model.asked[-1]]
    assert roles == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", first),
        ("user", "And now?"),
    ]


def test_the_base_answers_the_same_question(model: Model, capsys: Any) -> None:
    conversation = talk(model)
    conversation.hear("Hi")
    tuned = capsys.readouterr().out
    conversation.hear("/base")
    assert capsys.readouterr().out == f"{model.answer(base=True)}\n" != tuned
    assert model.asked[-1] == model.asked[-2]
    conversation.hear("And now?")
    assert model.asked[-1][2]["content"] == tuned.removesuffix("\n")


@pytest.mark.parametrize("history", [False, True])
def test_data_with_one_question_a_record(model: Model, history: bool) -> None:
    model.facts["multi_turn"] = False
    conversation = talk(model, history=history)
    conversation.hear("Hi")
    conversation.hear("And now?")
    assert len(model.asked[-1]) == (4 if history else 2)


def test_the_tools_of_the_data_or_others_are_offered(model: Model, tmp_path: Path) -> None:
    model.tools = [{"type": "function", "function": {"name": "set_timer"}}]
    talk(model).hear("Hi")
    assert model.offered == model.tools
    file = tmp_path / "tools.json"
    for text, expected in (('[{"name": "play"}]', [{"name": "play"}]), ("[]", None)):
        file.write_text(text)
        talk(model, tools=file).hear("Hi")
        assert model.offered == expected
    for text, told in (
        ("{}", "expected a JSON list of objects"),
        ("[", "tools.json: Expecting value"),
    ):
        file.write_text(text)
        with pytest.raises(CapasError, match=told):
            talk(model, tools=file)


def test_a_seed_draws_the_same_answer(model: Model, capsys: Any) -> None:
    said = []
    for seed in (1, 1, 2):
        talk(model, setting="warm", seed=seed).hear("Hi")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_the_help_names_every_command(model: Model, capsys: Any) -> None:
    talk(model).hear("/help")
    told = capsys.readouterr().err
    assert all(f"    /{c} " in told for c in ("base", "setting", "system", "reset", "help", "quit"))


def test_another_system_message(model: Model, capsys: Any) -> None:
    conversation = talk(model, system="Sing.")
    conversation.hear("Hi")
    assert model.asked[-1][0]["content"] == "Sing."
    conversation.hear("/system Shout, please.")
    conversation.hear("Hi")
    assert [m["content"] for m in model.asked[-1]] == ["Shout, please.", "Hi"]
    capsys.readouterr()
    conversation.hear("/system")
    assert capsys.readouterr().err == "System message: Shout, please.\n"
    conversation.hear("And now?")
    assert len(model.asked[-1]) == 4
    conversation.hear("/system none")
    conversation.hear("Hi")
    assert [m["content"] for m in model.asked[-1]] == ["Hi"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "/nothing",
            "there is no /nothing; there are /base, /help, /reset, /setting, /system, /quit",
        ),
        ("/setting cold", "generation.settings has no 'cold'; there are greedy, warm"),
        ("/setting", "now: greedy; there are greedy, warm"),
        ("word " * 200, "the model's context is 512 tokens: /reset for a new conversation"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(
    model: Model, line: str, told: str
) -> None:
    conversation = talk(model)
    conversation.hear("Hi")
    with pytest.raises(CapasError, match=told):
        conversation.hear(line)
    conversation.hear("And now?")
    assert [m["content"] for m in model.asked[-1]][1::2] == ["Hi", "And now?"]


def test_nothing_to_compare_and_the_end(model: Model, capsys: Any) -> None:
    conversation = talk(model)
    with pytest.raises(CapasError, match="no question has been asked yet"):
        conversation.hear("/base")
    assert conversation.hear("  \n")
    assert not conversation.hear("/quit")
    assert capsys.readouterr().out == ""
    with pytest.raises(CapasError, match="has no 'cold'"):
        talk(model, setting="cold")


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "x", ""])
def test_a_number_out_of_bounds_is_none(text: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--number", type=bounded(float, 1, 1e300))
    assert parser.parse_args(["--number", "2.5"]).number == 2.5
    with pytest.raises(
        argparse.ArgumentError, match=r"expected a finite number >= 1|invalid number"
    ):
        parser.parse_args([f"--number={text}"])
