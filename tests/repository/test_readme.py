"""The READMEs' results are those of reports/, and the files that they name exist.

`python tests/repository/test_readme.py` writes the tables anew.
"""

import csv
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
METRICS = ROOT / "reports/metrics"
START, END = (
    "<!-- results: checked by tests/repository/test_readme.py against reports/ -->",
    "<!-- /results -->",
)
TEXTS = {
    "README.md": {
        "decimal": ".",
        "head": "| exact match on test records with | base | tuned |",
        "seen": "seen phrasings and values, new requests",
        "values": "values that training never had",
        "phrasings": "phrasings that training never had",
        "combinations": "combinations that training never had",
        "both": "new values in new phrasings",
        "all": "all of them",
        "valid_json": "valid JSON, all records",
        "difference": "The difference is {mean} points, 95 % interval {low} to {high}. "
        "Three seeds of training: {seeds} % on average\n(`python benchmarks/seeds.py 0 1 2`).",
    },
    "README.es.md": {
        "decimal": ",",
        "head": "| coincidencia exacta en registros de prueba con | base | ajustado |",
        "seen": "frases y valores vistos, peticiones nuevas",
        "values": "valores que el entrenamiento no tuvo",
        "phrasings": "frases que el entrenamiento no tuvo",
        "combinations": "combinaciones que el entrenamiento no tuvo",
        "both": "valores nuevos en frases nuevas",
        "all": "todos",
        "valid_json": "JSON válido, todos los registros",
        "difference": "La diferencia es de {mean} puntos, intervalo del 95 % de {low} a {high}. "
        "Tres semillas: {seeds} % de media\n(`python benchmarks/seeds.py 0 1 2`).",
    },
}


def results(texts: dict[str, str]) -> str:
    base, tuned = (json.loads((METRICS / f"{m}.json").read_text()) for m in ("base", "tuned"))
    base = base["base"]
    shares: dict[str, dict[str, float]] = {}
    for row in csv.DictReader((ROOT / "reports/before_after.csv").open()):
        shares.setdefault(row["kind"], {})[row["model"]] = float(row["score"])
    shares["valid_json"] = {"base": base["valid_json"], "tuned": tuned["valid_json"]}
    order = [*(kind for kind in shares if kind not in ("all", "valid_json")), "all", "valid_json"]
    lines = [texts["head"], "|---|---:|---:|"]
    for kind in order:
        before, after = shares[kind]["base"], shares[kind]["tuned"]
        lines.append(f"| {texts[kind]} | {percent(before)} | {percent(after)} |")
    gain = {
        "mean": "exact_match_gain",
        "low": "exact_match_gain_low",
        "high": "exact_match_gain_high",
    }
    points = {name: f"{100 * tuned[key]:.1f}" for name, key in gain.items()}
    seeds = json.loads((ROOT / "benchmarks/results/seeds.json").read_text())["mean"]
    points["seeds"] = f"{100 * seeds['exact_match']:.1f}"
    text = "\n".join([*lines, "", texts["difference"].format(**points)])
    return re.sub(r"(\d)\.(\d)", rf"\1{texts['decimal']}\2", text)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def block(text: str) -> str:
    return text.split(START)[1].split(END)[0].strip()


@pytest.mark.parametrize("name", TEXTS)
def test_the_table_is_what_the_reports_say(name: str) -> None:
    shown = block((ROOT / name).read_text(encoding="utf-8"))
    assert shown.startswith(results(TEXTS[name])), "run: python tests/repository/test_readme.py"


@pytest.mark.skipif(
    not (ROOT / "reports/predictions.parquet").exists(), reason="no results here: run `dvc repro`"
)
@pytest.mark.parametrize("name", TEXTS)
def test_the_quoted_answers_are_those_of_the_result(name: str) -> None:
    quoted = block((ROOT / name).read_text(encoding="utf-8")).split("> ", 1)[1]
    request, base, tuned = re.fullmatch(
        r"(.+)\n>\n> \*\*base\*\* (.+)\n> \*\*\w+\*\* `(.+)`", quoted
    ).groups()
    rows = pq.read_table(ROOT / "data/raw/test.parquet").to_pylist()
    (record,) = (row["id"] for row in rows if request in [m["content"] for m in row["messages"]])
    for file, expected in (("predictions_base", base), ("predictions", tuned)):
        answers = pq.read_table(ROOT / f"reports/{file}.parquet").to_pylist()
        assert [row["completion"] for row in answers if row["id"] == record] == [expected]


@pytest.mark.parametrize("name", ["README.md", "README.es.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:conf|stages|tests|capas|benchmarks)/[\w/.]+\.\w+)`", text))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", text))
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
        (ROOT / name).write_text(
            f"{head}{START}\n{body}\n{END}{rest.split(END)[1]}", encoding="utf-8"
        )
