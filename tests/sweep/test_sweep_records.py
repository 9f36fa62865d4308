"""The scores of each record of a trial: read from DVC's cache, and what a sweep says with them."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sweeping import plan_in

from capas.sweep.plan import Plan
from capas.sweep.ranking import Row, rank
from capas.sweep.records import PREDICTIONS, VALIDATION, RecordScores, place_of, read_scores
from capas.sweep.state import DONE, FAILED, State
from capas.sweep.verdict import verdict
from capas.training.record_scores import write_scores

LOSS, ACCURACY = "train.validation_loss", "train.validation_token_accuracy"
SETTINGS = {
    "objective": LOSS,
    "direction": "minimize",
    "columns": [],
    "replicates": ["seed"],
    "confidence_fraction": 0.95,
}
VALIDATED = [[2.0, 1, 1], [4.0, 1, 3]]  # loss_sum, num_hits, num_supervised_tokens
ANSWERS = {
    "id": ["a", "b"],
    "loss": [2.0, 0.5],
    "num_supervised_tokens": [1, 3],
    "token_accuracy": [1.0, 0.0],
    "exact_match": [True, False],
    "stopped": [True, True],
    "rougeL": [0.2, None],
}


class Cache:
    """A sweep whose trials have these outputs in DVC's cache."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan, self.outs = plan_in(folder), dict[str, list[dict[str, str]]]()
        monkeypatch.setattr(
            Plan, "recorded", lambda _, name: {"stage": {"outs": self.outs.get(name, [])}}
        )

    def add(self, trial: str, path: str, content: bytes) -> Path:
        md5 = hashlib.md5(content).hexdigest()
        file = self.plan.home / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        self.outs.setdefault(trial, []).append({"path": path, "md5": md5})
        return file

    def read(self, objective: str, value: float | None, status: str = DONE) -> RecordScores | None:
        state = State("t", "t", [], status=status, metrics={objective: value})
        return read_scores(self.plan, [state], objective).get("t")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    found = Cache(tmp_path, monkeypatch)
    write_scores(tmp_path / "scores", ["a", "b"], VALIDATED)
    found.add("t", VALIDATION, (tmp_path / "scores").read_bytes())
    pq.write_table(pa.table(ANSWERS), tmp_path / "answers")
    found.add("t", PREDICTIONS, (tmp_path / "answers").read_bytes())
    return found


@pytest.mark.parametrize(
    ("objective", "value", "sums", "weights"),
    [
        (LOSS, 6 / 4, [2, 4], [1, 3]),
        (ACCURACY, 2 / 4, [1, 1], [1, 3]),
        ("tuned.loss", 3.5 / 4, [2, 1.5], [1, 3]),
        ("tuned.token_accuracy", 1 / 4, [1, 0], [1, 3]),
        ("tuned.exact_match", 0.5, [1, 0], [1, 1]),
        ("tuned.stop_rate", 1.0, [1, 1], [1, 1]),
    ],
)
def test_scores_are_those_whose_mean_is_the_objective(
    cache: Cache, objective: str, value: float, sums: list[float], weights: list[float]
) -> None:
    found = cache.read(objective, value)
    assert found is not None
    assert (found.ids, found.mean) == (("a", "b"), pytest.approx(value))
    assert (found.sums.tolist(), found.weights.tolist()) == (sums, weights)


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (LOSS, 1.6),  # another number: the file is not that of the objective
        ("tuned.exact_match", None),
        ("tuned.perplexity", 2.4),  # no mean over records
        ("tuned.rougeL", 0.2),  # a record has none
        ("format.num_dropped", 0.0),
    ],
)
def test_where_the_objective_is_no_mean_over_records_there_are_no_scores(
    cache: Cache, objective: str, value: float | None
) -> None:
    assert cache.read(objective, value) is None


def test_trials_that_failed_or_left_nothing_in_the_cache_have_no_scores(cache: Cache) -> None:
    assert cache.read(LOSS, 1.5, status=FAILED) is None
    cache.outs.clear()
    assert cache.read(LOSS, 1.5) is None


def test_a_damaged_file_is_told_and_does_not_count(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.outs.clear()
    file = cache.add("t", VALIDATION, b"PAR1")
    with caplog.at_level(logging.WARNING, "capas"):
        assert cache.read(LOSS, 1.5) is None
    assert f"the sweep cannot judge other records: {file} is damaged" in caplog.text


def test_a_mean_over_tokens_varies_as_that_of_the_other_records() -> None:
    """Mean 6 / 4; without the first record 4 / 3, without the second 2 / 1: pseudo-values 2 M - M_without."""
    found = RecordScores(("a", "b"), np.array([2.0, 4.0]), np.array([1.0, 3.0]))
    assert found.values() == pytest.approx([3 - 4 / 3, 3 - 2])
    plain = RecordScores(("a", "b", "c"), np.array([2.0, 4.0, 9.0]), np.ones(3))
    assert plain.values() == pytest.approx([2.0, 4.0, 9.0])


def test_few_long_records_leave_few_degrees_of_freedom() -> None:
    ones = np.ones(100)
    assert RecordScores(("",) * 100, ones, ones).degrees == 99
    long = np.array([100.0, 100.0, 100.0, *[1.0] * 97])
    assert RecordScores(("",) * 100, long, long).degrees == 2
    only = np.array([100.0, *[1.0] * 99])
    assert RecordScores(("",) * 100, only, only).degrees == 1


def test_places_are_those_of_the_objective() -> None:
    assert place_of("quantize.relative_error_mean") is None
    found = place_of("tuned.chrf")
    assert found is not None and (found.file, found.column) == (PREDICTIONS, "chrf")


def scored(values: dict[str, list[float]], num_records: int = 30, noise: float = 0.2) -> list[Row]:
    """Rows of trials {setting: loss with seed 0, 1, ...}; the first is the default."""
    rng, states, records = np.random.default_rng(0), [], {}
    ids = tuple(map(str, range(num_records)))
    for setting, losses in values.items():
        spread = noise * rng.standard_normal(num_records)  # some records favour the setting
        for seed, loss in enumerate(losses):
            name = f"{setting}-{seed}"
            overrides = [setting, f"seed={seed}"]
            states.append(State(name, name, overrides, status=DONE, metrics={LOSS: loss}))
            records[name] = RecordScores(ids, loss + spread - spread.mean(), np.ones(num_records))
    return rank(states, SETTINGS, [(next(iter(values)), "seed=0")], records)


def said(rows: list[Row]) -> str:
    return verdict(rows, SETTINGS)


def test_one_trial_each_is_told_apart_by_its_records_alone() -> None:
    rows = scored({"r=1": [1.0], "r=2": [0.5], "r=3": [0.49]})
    assert [(row.name, row.rank) for row in rows] == [("r=3-0", 1), ("r=2-0", 1), ("r=1-0", 3)]
    shown = said(rows)
    assert shown.startswith(
        "One trial each: what follows is about these trained models on other records than these 30. "
        "Another seed may give another order: add seed=1,2,3."
    )
    assert "2 settings may be the best" in shown
    assert "The first is better than the default by 0.51" in shown


def test_seeds_and_records_are_covered_together() -> None:
    rows = scored({"r=1": [1.0, 1.1, 1.05], "r=2": [0.5, 0.58, 0.54]})
    assert "other seeds than these 3 and other records than these 30, together" in said(rows)
    assert "The first is better than the default" in said(rows)
    spread = said(scored({"r=1": [1.0, 1.1, 1.05], "r=2": [0.5, 0.58, 0.54]}, noise=3))
    assert "No setting is shown to be better than the default" in spread


def test_what_one_seed_leaves_equal_is_no_tie_of_chance() -> None:
    assert said(scored({"r=1": [1.0], "r=2": [1.0]})).startswith("No setting is better: all 2")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ("lost", ": DVC's cache has no scores of each record of r=2-1"),
        ("other", ", because the trials were scored on different ones"),
    ],
)
def test_without_the_same_records_for_all_the_seeds_alone_are_judged(edit: str, why: str) -> None:
    values = {"r=1": [1.0, 1.1], "r=2": [0.5, 0.58]}
    rows: Any = scored(values)
    (row,) = [row for row in rows if row.overrides == ["r=2"]]
    of = row.records.pop(("seed=1",))
    if edit == "other":
        row.records["seed=1",] = RecordScores(("another", *of.ids[1:]), of.sums, of.weights)
    row.states[0].name = row.states[0].name if edit == "other" else "r=2-1"
    assert (
        f"other seeds than these 2, on the same records. Nothing is known of other records{why}."
        in said(rows)
    )


def test_few_records_tell_nothing_of_others() -> None:
    few = said(scored({"r=1": [1.0, 1.1], "r=2": [0.5, 0.58]}, num_records=19))
    assert "19 are too few to tell how much they vary" in few
    alone = said(scored({"r=1": [1.0], "r=2": [0.5]}, num_records=19))
    assert alone.startswith("One trial each: add seed=1,2,3 to see")
