"""The READMEs' results are those of reports/, and the files that they name exist.

`python tests/test_readme.py` writes the tables anew.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results: checked by tests/test_readme.py against reports/ -->", "<!-- /results -->"
TEXTS = {
    "README.md": {
        "head": "| test records | base | tuned |",
        "seen": "seen phrasings and values, new requests",
        "values": "values that training never had",
        "phrasings": "phrasings that training never had",
        "combinations": "combinations that training never had",
        "both": "new values in new phrasings",
        "all": "all {n}: exact match",
        "valid_json": "valid JSON",
        "difference": "The difference is {mean} points, 95 % interval {low} to {high}.",
    },
    "README.es.md": {
        "head": "| registros de prueba | base | ajustado |",
        "seen": "frases y valores vistos, peticiones nuevas",
        "values": "valores que el entrenamiento no tuvo",
        "phrasings": "frases que el entrenamiento no tuvo",
        "combinations": "combinaciones que el entrenamiento no tuvo",
        "both": "valores nuevos en frases nuevas",
        "all": "los {n}: coincidencia exacta",
        "valid_json": "JSON válido",
        "difference": "La diferencia es de {mean} puntos, intervalo del 95 % de {low} a {high}.",
    },
}


def results(texts: dict[str, str]) -> str:
    base, report = read("evaluation_base.json"), read("evaluation.json")
    tuned, difference = report["tuned"], report["difference"]["exact_match"]
    rows = [(texts[kind], base["by"]["kind"][kind], part) for kind, part in tuned["by"]["kind"].items()]
    rows.append((texts["all"].format(n=tuned["num_records"]), base, tuned))
    lines = [texts["head"], "|---|---:|---:|"]
    lines += [f"| {t} | {percent(b['exact_match'])} | {percent(a['exact_match'])} |" for t, b, a in rows]
    lines.append(f"| {texts['valid_json']} | {percent(base['valid_json'])} | {percent(tuned['valid_json'])} |")
    points = {name: f"{100 * value:.1f}" for name, value in difference.items()}
    return "\n".join([*lines, "", texts["difference"].format(**points)])


def read(name: str) -> Any:
    return json.loads((ROOT / "reports" / name).read_text())


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def block(text: str) -> str:
    return text.split(START)[1].split(END)[0].strip()


@pytest.mark.parametrize("name", TEXTS)
def test_the_table_is_what_the_reports_say(name: str) -> None:
    shown = block((ROOT / name).read_text(encoding="utf-8"))
    assert shown.startswith(results(TEXTS[name])), "run: python tests/test_readme.py"


@pytest.mark.parametrize("name", ["README.md", "README.es.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:conf|stages|tests|capas|benchmarks)/[\w/.]+\.\w+)`", text))
    named |= {target for target in re.findall(r"\]\(([\w./-]+)\)", text)}
    missing = [n for n in sorted(named) if "NAME" not in n and not (ROOT / n).exists()]
    assert named
    assert missing in ([], ["stages/verb_noun.py"])


@pytest.mark.parametrize("name", TEXTS)
def test_a_readme_is_short_and_starts_with_a_command(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert any(line.startswith("make repro") for line in lines[:20])


if __name__ == "__main__":
    for name, texts in TEXTS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        head, rest = text.split(START)
        kept = block(text).split("\n\n", 2)[2:]  # the prompt and its answers, written by hand
        body = "\n\n".join([results(texts), *kept])
        (ROOT / name).write_text(f"{head}{START}\n{body}\n{END}{rest.split(END)[1]}", encoding="utf-8")
