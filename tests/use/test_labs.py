"""LABS.md and LABS.es.md: the same commands in both, and what they say one sees is what appears."""

import csv
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from workspace import Workspace, make_workspace

from capas.chat.template import Template, place_system

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"en": "LABS.md", "es": "LABS.es.md"}
NUM_LABS = 6
TOLERANCE = 0.1  # of a number, as the pages say
SPOKEN = {"en": ("Be brief.", "Hi", "Hello."), "es": ("Sé breve.", "Hola", "Hola, ¿qué tal?")}
NAMED = {  # the tokens that the families' own tokenizers bring
    "llama3": {"bos_token": "<|begin_of_text|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "qwen": {},
    "gemma": {"bos_token": "<bos>"},
}
NUMBER = {
    "en": r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-−]\d+)?",
    "es": r"\d+(?:[.,]\d+)?(?:e[-−]\d+)?",
}


@dataclass(frozen=True)
class Lab:
    title: str
    text: str
    commands: str
    shown: list[str]


def page(language: str) -> str:
    return (ROOT / PAGES[language]).read_text(encoding="utf-8")


def labs(language: str) -> list[Lab]:
    parts = re.split(r"^## (?=\d\. )", page(language), flags=re.MULTILINE)[1:]
    return [
        Lab(part.splitlines()[0], part, *(block(part, kind) for kind in ("bash", "text")))
        for part in parts
    ]


def block(text: str, kind: str) -> Any:
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return found.splitlines() if kind == "text" else found


def plain(command: str) -> str:
    """Without the choice of a language."""
    return re.sub(r" (?:--language|sweep\.language=)[ ]?es", "", command)


def value(number: str, language: str) -> float:
    if language == "es":
        return float(number.replace(",", ".").replace("−", "-"))
    return float(number.replace(",", "").replace("−", "-"))


def missing(shown: list[str], output: str, language: str) -> list[str]:
    """The shown lines that the output has not, in their order; numbers may differ by the tolerance."""
    lines, lost = iter(output.splitlines()), []
    for line in shown:
        if not any(_is_shown(line, found, language) for found in lines):
            lost.append(line)
            lines = iter(output.splitlines())
    return lost


def _is_shown(line: str, found: str, language: str) -> bool:
    number = NUMBER[language]
    expected, pattern = [], ""
    for word in re.split(rf"(\.\.\.|\s+|(?<![\w.]){number})", line.strip()):
        if word == "...":
            pattern += ".*"
        elif re.fullmatch(number, word):
            expected.append(value(word, language))
            pattern += f"({number})"
        else:
            pattern += r"\s+" if word and not word.strip() else re.escape(word)
    match = re.fullmatch(pattern, found.strip())
    return match is not None and all(
        math.isclose(value(one, language), wanted, rel_tol=TOLERANCE)
        for one, wanted in zip(match.groups(), expected, strict=True)
    )


def test_a_line_that_differs_is_missing() -> None:
    shown = ["loss 1.0, ... left", "gemma   90.0%"]
    assert missing(shown, "x\nloss 1.05, 7 tokens, 3 s left\ngemma 89.0%", "en") == []
    assert missing(shown, "loss 1.2, 7 s left\ngemma 90.0%", "en") == shown[:1]
    assert missing(shown, "gemma 90.0%\nloss 1.0, 7 s left", "en") == shown[1:]
    assert missing(shown, "loss 1.0, 7 s left\nllama 90.0%", "en") == shown[1:]
    assert missing(["0,0,6.5,0.3"], "0,0,6.5,0.3", "es") == []
    assert missing(["0,0,6.5,0.3"], "0,0,6.5,0.4", "en") != []
    assert missing(["9 992 de 1,5e−05"], "9\u202f990 de 1,6e−05", "es") == []
    assert missing(["9 992 de 1,5e−05"], "9\u202f990 de 1,9e−05", "es") != []


def test_both_pages_have_the_same_commands_and_numbers() -> None:
    english, spanish = labs("en"), labs("es")
    assert len(english) == len(spanish) == NUM_LABS
    for one, other in zip(english, spanish, strict=True):
        assert one.commands == plain(other.commands)
        for a, b in zip(one.shown, other.shown, strict=True):
            assert a == b or numbers(a, "en") == numbers(b, "es")
        assert "**What it teaches.**" in one.text and "**Qué enseña.**" in other.text
        assert "**Back.**" in one.text and "**Para volver.**" in other.text
    tables = {code: re.findall(r"^\| \w+ \|( .*%.*)$", page(code), re.MULTILINE) for code in PAGES}
    assert len(tables["en"]) == 5
    assert [numbers(row, "en") for row in tables["en"]] == [numbers(r, "es") for r in tables["es"]]


def numbers(line: str, language: str) -> list[float]:
    """A Spanish number may have blanks between its thousands."""
    joined = re.sub(r"(?<=\d) (?=\d{3}\b)", "", line) if language == "es" else line
    return [value(number, language) for number in re.findall(NUMBER[language], joined)]


@pytest.mark.parametrize("language", PAGES)
@pytest.mark.parametrize("family", NAMED)
def test_a_real_format_is_the_one_that_our_template_writes(family: str, language: str) -> None:
    options = yaml.safe_load((ROOT / f"conf/chat_template/{family}.yaml").read_text())
    roles = ("system", "user", "assistant")
    messages = [
        {"role": role, "content": content}
        for role, content in zip(roles, SPOKEN[language], strict=True)
    ]
    text = (ROOT / f"conf/chat_template/{family}.jinja").read_text(encoding="utf-8")
    placed = place_system(messages, options.get("system", "template"))
    rendered = Template(text, NAMED[family], "26 Jul 2024").render(placed)
    assert block(page(language), family) == f"{rendered.rstrip()}\n"


@pytest.mark.parametrize(
    ("readme", "name"), [("README.md", "LABS.md"), ("README.es.md", "LABS.es.md")]
)
def test_the_readme_links_the_page(readme: str, name: str) -> None:
    assert f"]({name})" in (ROOT / readme).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A clone after `dvc repro`; what the repository's cache has is not computed again."""
    workspace = make_workspace(tmp_path_factory.mktemp("labs"))
    for file in cached_here(workspace):
        target = workspace.root / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, target)
    workspace.repro()
    workspace.commit()
    return workspace


def cached_here(workspace: Workspace) -> Iterator[str]:
    """The files of DVC's cache that dvc.lock names, where this repository has them."""
    for md5 in workspace.outputs().values():
        file = f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}"
        if (ROOT / file).is_file():
            yield file
            entries = yaml.safe_load((ROOT / file).read_text()) if md5.endswith(".dir") else []
            for entry in entries:
                yield f".dvc/cache/files/md5/{entry['md5'][:2]}/{entry['md5'][2:]}"


@pytest.mark.slow
@pytest.mark.parametrize("language", PAGES)
def test_what_the_page_shows_is_what_appears(finished: Workspace, language: str) -> None:
    """Of the Spanish page the labs that answer in Spanish."""
    told = [lab for lab in labs(language) if language == "en" or "--language es" in lab.commands]
    assert len(told) == (NUM_LABS if language == "en" else 3)
    lock, params = finished.read("dvc.lock"), finished.read("params.yaml")
    lost = {}
    for lab in told:
        output = finished.run("bash", "-ec", lab.commands)
        if lines := missing(lab.shown, output, language):
            lost[lab.title] = {"missing": lines, "output": output}
        assert finished.run("git", "status", "--porcelain") == ""
    assert lost == {}
    assert (finished.read("dvc.lock"), finished.read("params.yaml")) == (lock, params)
    assert "up to date" in finished.run("dvc", "status")


SHORT = ("trainer.max_steps=80", "trainer.eval_steps=80", "evaluation.max_records=20")
TWO = ("-m", "sweep=templates", "chat_template=chatml,mistral", *SHORT)
TABLE = "reports/templates.csv"


@pytest.mark.slow
def test_a_sweep_over_templates_asks_each_model_in_each_format(finished: Workspace) -> None:
    """The diagonal is what the stage `evaluate` found; the same sweep again runs and changes nothing."""
    said = finished.run(sys.executable, "stages/sweep.py", *TWO)
    rows = list(csv.DictReader(io.StringIO(finished.read(TABLE))))
    pairs = [(row["trained_with"], row["asked_in"]) for row in rows]
    assert pairs == [
        (one, other) for one in ("chatml", "mistral") for other in ("chatml", "mistral")
    ]
    for row in rows:
        if row["trained_with"] == row["asked_in"]:
            metrics = metrics_of(finished, row["trained_with"])
            assert float(row["score"]) == metrics["exact_match"]
            assert float(row["stop_rate"]) == metrics["stop_rate"]
    assert max(float(row["score"]) for row in rows) > 0
    assert said.count("sweep: trained with") == len(rows)
    before = [finished.read(file) for file in (TABLE, "reports/templates.md")]
    again = finished.run(sys.executable, "stages/sweep.py", *TWO)
    assert again.count("(had it)") == 2 and "sweep: trained with" not in again
    assert [finished.read(file) for file in (TABLE, "reports/templates.md")] == before
    assert finished.run("git", "status", "--porcelain") == ""


def metrics_of(workspace: Workspace, template: str) -> dict[str, float]:
    """reports/metrics/tuned.json of the experiment that was trained with a template."""
    names = workspace.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()
    (name,) = [name for name in names if f"chat_template={template}-" in name]
    found: dict[str, float] = json.loads(
        workspace.run("git", "show", f"{name}:reports/metrics/tuned.json")
    )
    return found
