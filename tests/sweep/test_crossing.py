"""A sweep over chat templates: what may be crossed, what is asked, and what the table says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sweeping import plan_in

from capas.core.errors import CapasError
from capas.evaluation.formats import Answers
from capas.sweep import crossing, driver
from capas.sweep.crosstable import CSV, TEXT, CrossTable
from capas.sweep.plan import Plan
from capas.sweep.ranking import Row
from capas.sweep.state import DONE, State
from capas.sweep.task import prepare

SCORES = {"chatml": (0.9, 0.6, 0.9), "llama3": (0.8, 1.0, 0.8), "qwen": (0.9, 0.6, 0.9)}
IDS = {"chatml": "x", "llama3": "y", "qwen": "x"}


def cells(scores: dict[str, tuple[float, ...]] = SCORES) -> list[dict[str, Any]]:
    return [
        {
            "trained_with": trained,
            "asked_in": asked,
            "num_records": 50,
            "score": score,
            "stop_rate": 1.0,
            "ids": IDS[asked],
        }
        for trained, row in scores.items()
        for asked, score in zip(scores, row, strict=True)
    ]


def test_formats_with_the_same_ids_are_one_format() -> None:
    facts = CrossTable(cells(), "exact_match").facts
    assert facts["own"] == pytest.approx((0.9 + 1.0 + 0.9) / 3)
    assert facts["other"] == pytest.approx((0.6 + 0.8 + 0.8 + 0.6) / 4)
    assert facts["loses"] == pytest.approx({"chatml": 0.3, "llama3": 0.2, "qwen": 0.3})
    assert (facts["most"], facts["least"]) == ("chatml", "llama3")
    assert facts["worst"] == ("chatml", "llama3") and facts["same"] == [["chatml", "qwen"]]


def test_the_table_is_told_in_both_languages(tmp_path: Path) -> None:
    table = CrossTable(cells(), "exact_match")
    english, spanish = (table.text(code).splitlines() for code in ("en", "es"))
    assert english[:2] == [
        "exact_match of 50 test questions. Rows: trained with; columns: asked in.",
        "        chatml  llama3   qwen",
    ]
    assert english[3].split() == ["llama3", "80.0%", "100%", "80.0%"]
    assert spanish[3].split() == ["llama3", "80,0", "%", "100", "%", "80,0", "%"]
    assert (
        "gives erratic answers" in english[5]
        and "93.3% on average, in another one 70.0%" in english[5]
    )
    assert "da respuestas erráticas" in spanish[5]
    assert english[6].startswith(
        "The most sensitive is the model trained with chatml: 30.0 points lower"
    )
    assert english[7].startswith("chatml and qwen write these questions with the same ids")
    table.write(tmp_path)
    lines = (tmp_path / CSV).read_text().splitlines()
    assert lines[:2] == [
        "trained_with,asked_in,num_records,score,stop_rate",
        "chatml,chatml,50,0.9,1.0",
    ]
    assert "| llama3 | 80.0% | 100% | 80.0% |" in (tmp_path / TEXT).read_text()
    shown = driver.summary([row("a")], SETTINGS, False, {}, table)
    assert "| llama3 | 80.0% | 100% | 80.0% |" in shown["tags"]["mlflow.note.content"]


def test_no_more_is_said_than_the_table_shows() -> None:
    alike = dict.fromkeys(SCORES, (0.5, 0.5, 0.5))
    assert "do not mind the format" in CrossTable(cells(alike), "exact_match").text("en")
    same = [{**cell, "ids": "x"} for cell in cells(alike)]
    said = CrossTable(same, "exact_match").text("en")
    assert "to the model they are one format" in said and "sensitive" not in said


SETTINGS = {
    "objective": "tuned.exact_match",
    "direction": "maximize",
    "columns": [],
    "replicates": ["seed"],
    "confidence_fraction": 0.95,
}


def row(name: str) -> Row:
    return Row([], [State(name, name, [], status=DONE)], {(): 0.5}, 0.95)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    made = plan_in(tmp_path)
    made.folder.mkdir(parents=True)
    return made


def test_the_sweep_trains_each_family_once(plan: Plan) -> None:
    task = prepare(plan.home, ["sweep=templates"], True)
    presets = [point.values["chat_template"]["preset"] for point in task.points]
    assert sorted(presets) == ["chatml", "gemma", "llama3", "mistral", "qwen"]
    assert {point.values["trainer"]["max_steps"] for point in task.points} == {150}
    assert task.launcher["_target_"].endswith("JoblibLauncher") and task.launcher["n_jobs"] == 2
    two = prepare(plan.home, ["sweep=templates", "chat_template=chatml,llama3"], True)
    assert len(two.points) == 2 and two.settings["cross_templates"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=1,2"], "needs at least two trials that differ only in chat_template"),
        (["chat_template=chatml"], "at least two trials"),
        (["evaluation=loss", "sweep.objective=tuned.loss", "sweep.columns=[]"], "needs a metric"),
    ],
)
def test_what_cannot_be_crossed_is_told_before_a_point_runs(
    plan: Plan, words: list[str], told: str
) -> None:
    with pytest.raises(CapasError, match=f"cross_templates=true .*{told}|{told}"):
        prepare(plan.home, ["sweep=templates", *words], True)


def test_what_is_the_same_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """qwen asks with chatml's ids, and left chatml's weights; one record is not in all splits."""
    records = {"chatml": [[1], [2], [3]], "llama3": [[4], [5]], "qwen": [[1], [2], [3]]}
    asked: list[tuple[str, list[list[int]]]] = []

    def ask(model: str, rows: Any, form: Any, *_: Any) -> Answers:
        asked.append((model, form.prompts))
        return Answers([], 0.25 * len(asked), 1.0)

    monkeypatch.setattr(crossing, "ask", ask)
    monkeypatch.setattr(crossing, "answer_limit", lambda *_: 9)
    monkeypatch.setattr("tokenizers.Tokenizer.from_file", lambda _: None)
    monkeypatch.setattr("capas.evaluation.scorer.Scorer", lambda *_: None)
    evaluation = SimpleNamespace(metrics=["exact_match"], max_new_tokens=None, batch_size=2)
    models: list[Any] = [
        SimpleNamespace(
            template=name,
            records=lambda of=of: [{"id": str(i), "prompt_ids": ids} for i, ids in enumerate(of)],
            params=SimpleNamespace(evaluation=evaluation),
            folder=Path("x"),
            chat={"stop_token_ids": [7]},
            weights=["a" if name != "llama3" else "b"],
            load=lambda name=name: name,
        )
        for name, of in records.items()
    ]
    found = list(crossing._cells(models))
    assert asked == [
        (model, prompts) for model in ("chatml", "llama3") for prompts in ([[1], [2]], [[4], [5]])
    ]
    by = {(cell["trained_with"], cell["asked_in"]): cell for cell in found}
    assert by["qwen", "llama3"]["score"] == by["chatml", "llama3"]["score"] == 0.5
    assert {cell["num_records"] for cell in found} == {2}
    assert by["llama3", "qwen"]["ids"] == by["llama3", "chatml"]["ids"]


def test_the_table_of_the_same_models_is_kept_and_that_of_others_is_not(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = dict.fromkeys((*crossing._FOLDERS, *crossing._FILES), "m")
    lock = {"train": {"outs": [{"path": path, "md5": md5} for path, md5 in outs.items()]}}
    lock["evaluate"] = {"params": {"params.yaml": {"evaluation": {"metrics": ["own/x.py:kind"]}}}}  # type: ignore[dict-item]
    monkeypatch.setattr(Plan, "recorded", lambda *_: lock)
    monkeypatch.setattr(crossing.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    facts = {"key": crossing.table_key(plan, ["a", "b"]), "cells": cells()}
    (plan.folder / crossing.KEPT).write_text(json.dumps(facts))
    found = crossing.cross([row("a"), row("b")], plan)
    assert (found.cells, found.metric) == (cells(), "kind")
    lock["train"]["outs"][0]["md5"] = "other"
    told = "could not be asked in each other's format, see above"
    with pytest.raises(CapasError, match=told):
        crossing.cross([row("a"), row("b")], plan)
    table, refusal = driver._cross([row("a"), row("b")], plan, {crossing.SETTING: True})
    assert table is None and told in refusal  # and the ranking is shown
    assert driver._cross([row("a")], plan, {crossing.SETTING: False}) == (None, "")


def test_an_output_that_is_not_in_the_cache_is_named(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "recorded", lambda *_: {})
    with pytest.raises(CapasError, match="data/models/adapter: DVC's cache does not hold it"):
        crossing.Model(plan, "a", plan.home / "laid-out")
