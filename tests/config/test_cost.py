"""What a run costs: seconds of the stages from measured steps, and how it is told."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shipped import composed

from capas.config import cost, duration
from capas.config.duration import Load, Speed, advice, stage_seconds
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.models import hardware
from stages import compose_params

REPOSITORY = Path(__file__).resolve().parents[2]
LOAD = Load(
    num_train=400,
    num_validation=20,
    num_test=100,
    length=100.0,
    prompt_length=40.0,
    limit=80,
    longest=64,
    train_batch=8,
    accumulation=2,
    num_processes=1,
    epochs=2.0,
    max_steps=-1,
    eval_steps=25,
    score_batch=16,
    generates=True,
    num_labels=0,
    quantizes=True,
    num_completions=18,
    num_sequences=3,
    num_answered=0,
    validation_batch=8,
)
SPEED = Speed(
    train_batch=10.0,
    score=0.5,
    tuned_score=1.0,
    answer=1.0,
    tuned_answer=2.0,
    labels=0.0,
    tuned_labels=0.0,
    sample=0.1,
    tuned_sample=0.2,
    start=5.0,
    weight_bytes=2**29,
)


def test_seconds_of_each_stage_by_hand() -> None:
    assert LOAD.steps == 50 and LOAD.batch == 16
    assert replace(LOAD, num_processes=2).steps == 26
    assert stage_seconds(LOAD, SPEED) == {
        "quantize": 5 + 2,
        "evaluate_base": 5 + 2 * 100 * 0.5 + 7 * 80,
        "train": 5 + 50 * 2 * 10 + 4 * 20 * 1.0,
        "evaluate": 5 + 100 * 1.0 + 7 * 2 * 64 + 40 * 0.4 * 1.5,
        "sample": 5 + 18 * 80 * (0.1 + 0.2),
    }
    answering = stage_seconds(replace(LOAD, num_answered=12), SPEED)
    assert answering["train"] == stage_seconds(LOAD, SPEED)["train"] + 4 * 2 * 2 * 80
    assert replace(LOAD, max_steps=3).steps == 3
    without = stage_seconds(replace(LOAD, generates=False, quantizes=False), SPEED)
    assert without["evaluate_base"] == 5 + 50 and without["quantize"] == 5
    comparing = replace(SPEED, labels=3.0, tuned_labels=4.0)
    labelled = stage_seconds(replace(LOAD, generates=False, num_labels=4), comparing)
    assert labelled["evaluate_base"] == 5 + 100 * (2 * 0.5 + 3.0)
    assert labelled["evaluate"] == 5 + 100 * (1.0 + 4.0) + 40 * 0.4 * 1.5
    uncompared = stage_seconds(replace(LOAD, generates=False), comparing)
    assert uncompared["evaluate"] == 5 + 100 * 1.0 + 40 * 0.4 * 1.5


def test_the_two_settings_that_save_most_are_named() -> None:
    ways = advice(LOAD, SPEED)
    assert [way.partition(": about")[0] for way in ways] == [
        "evaluation=loss",
        "dataset.max_records=260",
    ]
    longer = replace(LOAD, epochs=40.0)
    assert advice(longer, SPEED)[0].startswith("trainer.num_train_epochs=1: about ")
    assert advice(replace(LOAD, epochs=1.0, num_train=2, num_test=1, generates=False), SPEED) != []


def lines(monkeypatch: pytest.MonkeyPatch, speed: Speed, *overrides: str) -> str:
    values = composed(overrides)
    monkeypatch.setattr(hardware, "prepare", lambda _: None)
    monkeypatch.setattr(duration, "measure", lambda *_: speed)
    need = SimpleNamespace(
        found=SimpleNamespace(total=2**30), used_bytes=2**29, free_bytes=2**31, fits=True
    )
    monkeypatch.setattr(cost, "of_training", lambda *_: need)
    params = Params(values)
    return "\n".join(
        cost.lines(params, REPOSITORY, {"train": 6000, "validation": 200, "test": 500})
    )


def test_disk_memory_and_minutes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines(monkeypatch, SPEED)
    assert "disk        about 2 MiB" in said and "download" not in said
    assert "memory      at most 1,536 MiB; 2,560 MiB available" in said
    assert "750 steps of 16 records" in said and "500 answers of up to" in said
    assert said.count("shorter: ") == 2
    labelled = lines(monkeypatch, SPEED, "evaluation=labels", "evaluation.labels=[a,b,c]")
    assert "500 test records with each of 3 labels" in labelled
    quick = replace(SPEED, train_batch=0.1, answer=0.01, tuned_answer=0.01, sample=0.01)
    assert "shorter" not in lines(monkeypatch, quick)


def test_without_the_data_the_time_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "prepare", lambda _: None)
    need = SimpleNamespace(found=SimpleNamespace(total=1), used_bytes=1, free_bytes=1, fits=True)
    monkeypatch.setattr(cost, "of_training", lambda *_: need)
    *_, last = cost.lines(Params(composed(("dataset=gsm8k",))), REPOSITORY, None)
    assert "unknown until the data is downloaded" in last
    assert cost.split_counts(Params(composed(("dataset=gsm8k",))["dataset"]), REPOSITORY) is None


def test_lengths_are_those_of_the_users_own_records(tmp_path: Path) -> None:
    (tmp_path / "data/own").mkdir(parents=True)
    rows = [f"What is {'x ' * i}?,Answer {i}." for i in range(40)]
    (tmp_path / "data/own/mine.csv").write_text("\n".join(["question,answer", *rows]))
    shutil.copytree(REPOSITORY / "data/embedded", tmp_path / "data/embedded")
    values = {**composed(("dataset=own_csv", "evaluation=text"))}
    load = cost.load_of(Params(values), tmp_path, {"train": 30, "validation": 2, "test": 8})
    assert load.num_test == 8 and load.generates
    assert load.limit == load.longest + max(8, load.longest // 4)
    assert 20 < load.prompt_length < load.length < 100
    assert load.num_answered == 0
    values["trainer"] |= {"metric_for_best_model": "chrf"}
    answering = cost.load_of(Params(values), tmp_path, {"train": 30, "validation": 2, "test": 8})
    assert answering.num_answered == 2
    nothing = {**values, "dataset": {**values["dataset"], "data_files": "data/own/none.csv"}}
    with pytest.raises(CapasError, match=r"none\.csv"):
        cost.load_of(Params(nothing), tmp_path, {"train": 30, "validation": 2, "test": 8})


def test_compose_measures_a_model_of_ones_own_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compose_params.COST, raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    embedded = composed(())
    other: dict[str, Any] = {
        **embedded,
        "model": {**embedded["model"], "model_name_or_path": "org/name"},
    }
    assert compose_params.is_costly(embedded, other) and compose_params.is_costly({}, other)
    assert not compose_params.is_costly(other, other)
    assert not compose_params.is_costly(other, embedded)
    assert compose_params.is_costly(other, {**other, "lora": {**other["lora"], "r": 8}})
    monkeypatch.setenv(compose_params.COST, "off")
    assert not compose_params.is_costly(embedded, other)


def test_a_cost_that_cannot_be_said_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "capas")
    compose_params.tell_cost()
    assert "the cost of the run could not be estimated: " in caplog.text


@pytest.mark.slow
def test_the_embedded_model_is_measured_for_real() -> None:
    params = Params(composed(()))
    load = cost.load_of(params, REPOSITORY, {"train": 6000, "validation": 200, "test": 500})
    found = duration.measure(REPOSITORY / "data/embedded", params, load, 1.0)
    assert 0 < found.score < found.train_batch
    assert found.sample >= 0 and found.tuned_answer >= 0
    assert found.weight_bytes > 10**5
