"""The labs that have a command of their own, on tiny models; tests/use/test_labs.py runs them whole."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import template_text
from tiny import write_tokenizer, write_workspace
from transformers import AutoModelForCausalLM

from capas import __main__ as cli
from capas.chat.format import ChatFormat
from capas.core.dag import read_yaml
from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.language import Language
from capas.core.params import Params, flatten
from capas.core.records import FORMATTED, IGNORE_INDEX, read_records, write_records
from capas.evaluation.attention import IMPLEMENTATIONS
from capas.evaluation.formats import Answers, Format
from capas.evaluation.prompts import Prompt
from capas.use.lab import attention, end_token, template
from capas.use.lab.questions import Questions, shorten

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "capas/use/lab"
SPOKEN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
RECORD = {"id": "a", "reference": "yes", "metadata": ""}


class Asked(Questions):
    """One question; answers are canned, by the first id that asks."""

    def ask(self, served: Any, asked: Format | None = None) -> Answers:
        right = asked is None
        return Answers(["yes" if right else "no\n"], float(right), 0.5)

    @contextmanager
    def served(self, *_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(format=SimpleNamespace(folder=self.folder))


@contextmanager
def asked(folder: Path) -> Iterator[Asked]:
    params = Params({"chat_template": {"preset": "chatml"}})
    scorer: Any = SimpleNamespace(names=["exact_match"])
    chat = ChatFormat.load(template_text("chatml"), folder, "")
    record = {**RECORD, "prompt_ids": chat.prompt_ids(SPOKEN)}
    yield Asked(ROOT, folder, params, [record], [Prompt("a", SPOKEN, "yes")], scorer)


def language(code: str) -> Language:
    return Language(LAB, code, {})


@pytest.mark.parametrize(
    ("code", "refused", "finding"),
    [
        ("en", "cannot be asked", "Trained in chatml, the model scores 100% in its own format"),
        ("es", "no se puede preguntar", "Entrenado con chatml, el modelo acierta el 100 % en su"),
    ],
)
def test_a_row_for_each_template_that_the_tokenizer_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, refused: str, finding: str
) -> None:
    """This tokenizer lacks the control tokens of Mistral and Gemma."""
    write_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(template, "questions", lambda *_: asked(tmp_path / "tokenizer"))
    lines = "\n".join(template.run(ROOT, 1, language(code))).splitlines()
    rows = {line.split()[0]: line for line in lines[2:7]}
    assert list(rows) == ["chatml", "gemma", "llama3", "mistral", "qwen"]
    assert [name for name, line in rows.items() if refused in line] == ["gemma", "mistral"]
    assert rows["llama3"].split() in (["llama3", "0%", "50.0%"], ["llama3", "0", "%", "50,0", "%"])
    assert re.sub(r"\s", " ", lines[-1]).startswith(finding)
    assert "qwen" in lines[-1] and "llama3: 0" in lines[-1]
    assert [line for line in lines if line.startswith("llama3       ")][-1].endswith(r"no\n")


def test_another_end_token_in_the_loss_and_not_in_the_loss() -> None:
    """Two answers: of the first one the end token stays in the history, and leaves the loss in both."""
    ids, no = [7, 11, 4, 8, 12, 4, 9], IGNORE_INDEX
    record = {"id": "a", "input_ids": ids, "labels": [no, 11, 4, no, 12, 4, no]}
    with_loss = end_token.with_end_token(record, [4, 2], 5, in_loss=True)
    without = end_token.with_end_token(record, [4, 2], 5, in_loss=False)
    assert with_loss["input_ids"] == without["input_ids"] == [7, 11, 4, 8, 12, 5, 9]
    assert with_loss["labels"] == [no, 11, no, no, 12, 5, no]
    assert without["labels"] == [no, 11, no, no, 12, no, no]
    assert record["input_ids"] == ids


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("lab"))


def test_the_new_end_token_is_one_that_no_record_holds(workspace: Path, tmp_path: Path) -> None:
    chat = read_json(workspace / "data/formatted/chat.json")
    name, number = end_token.unused_token(workspace, chat)
    assert name == "<|start_header_id|>"
    file = tmp_path / "data/formatted/train.parquet"
    file.parent.mkdir(parents=True)
    (tmp_path / "data/models").mkdir()
    (tmp_path / "data/models/tokenizer").symlink_to(workspace / "data/models/tokenizer")
    (record, *_) = read_records(workspace / "data/formatted/train.parquet", FORMATTED)
    ids = [number, number + 1]
    write_records(file, FORMATTED, [{**record, "input_ids": ids, "labels": ids}])
    assert end_token.unused_token(tmp_path, chat) == ("<|im_start|>", number - 2)
    every = list(range(number + 3))
    write_records(file, FORMATTED, [{**record, "input_ids": every, "labels": every}])
    with pytest.raises(CapasError, match="every control token is in the data already"):
        end_token.unused_token(tmp_path, chat)


def test_a_training_gets_the_other_records_and_a_failed_one_is_told(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], Path]] = []

    def run(command: list[str], cwd: Path, **_: Any) -> Any:
        started.append((command[1:], cwd))
        return SimpleNamespace(returncode=len(started) - 1)

    monkeypatch.setattr(end_token.subprocess, "run", run)
    before = (workspace / "data/formatted/train.parquet").read_bytes()
    adapter = end_token.train(workspace, 5, in_loss=True)
    ((command, work),) = started
    assert command[:2] == ["stages/train_lora.py", "trainer.max_steps=100"]
    assert work in adapter.parents and work.is_relative_to(workspace / ".dvc/tmp/lab")
    assert (work / "data/models").resolve() == workspace / "data/models"
    assert read_json(work / "data/formatted/chat.json")["stop_token_ids"] == [5]
    (record, *_) = read_records(work / "data/formatted/train.parquet", FORMATTED)
    assert [label for label in record["labels"] if label != IGNORE_INDEX][-1] == 5
    assert (workspace / "data/formatted/train.parquet").read_bytes() == before
    with pytest.raises(CapasError, match=r"the training in \.dvc/tmp/lab/end-token/in-loss failed"):
        end_token.train(workspace, 5, in_loss=True)


def test_logits_of_both_implementations_are_compared_token_by_token(tiny_model_dir: Path) -> None:
    lengths = (3, 9, 5)
    records = [{"id": "a", "input_ids": list(range(n)), "labels": list(range(n))} for n in lengths]
    params = Params({"evaluation": {"batch_size": 2}})
    some: Any = SimpleNamespace(records=records, params=params)
    found = []
    for way in IMPLEMENTATIONS:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation=way)
        served = SimpleNamespace(model=model.eval(), chat={"pad_token_id": 0})
        found.append(attention.logits_of(served, some))
    eager, sdpa = found
    assert eager.shape[0] == sum(lengths)
    assert torch.allclose(eager, sdpa, atol=1e-5)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(2)
    assert not torch.allclose(attention.logits_of(served, some), sdpa, atol=1e-5)


PROBE = """
import sys
from pathlib import Path
from capas.use.lab import attention, end_token, template

def questions(root, count):
    raise SystemExit("torch" in sys.modules)

LAB.questions = questions
list(LAB.run(Path.cwd(), 1, None))
"""


@pytest.mark.parametrize("lab", ["attention", "end_token", "template"])
def test_torch_is_not_imported_before_its_kernels_are_chosen(lab: str) -> None:
    command = [sys.executable, "-c", PROBE.replace("LAB", lab)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_an_answer_is_shown_as_one_line() -> None:
    assert shorten('{"a": "ñ"}\n') == '{"a": "ñ"}\\n'
    assert len(shorten("x" * 500)) == 120


def test_without_a_result_the_way_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {}}))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lab", "template"]) == 2
    assert "no trained model in this workspace. Run `dvc repro`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["lab", "attention", "--records", "0"])
    assert "expected a finite number >= 1" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["capas/use/lab", "capas/sweep"])
def test_both_languages_have_the_same_texts(folder: str) -> None:
    english, spanish = (flatten(read_yaml(ROOT / folder / f"{code}.yaml")) for code in ("en", "es"))
    assert english.keys() == spanish.keys()
