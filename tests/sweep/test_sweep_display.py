"""What a sweep shows: names after what is swept, the ranking, remarks on it, and signs of life."""

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from capas.sweep import display
from capas.sweep.display import Screen, print_ranking
from capas.sweep.names import distinct, name_of, short_keys, swept_values
from capas.sweep.ranking import Row, rank
from capas.sweep.remarks import remarks
from capas.sweep.state import CACHED, DONE, FAILED, RUNNING, State

CONF = Path(__file__).resolve().parents[2] / "conf"
RATE = "trainer.learning_rate"
SETTINGS: dict[str, Any] = {
    "objective": "train.validation_loss",
    "direction": "minimize",
    "columns": ["tuned.exact_match"],
    "replicates": ["seed"],
    "confidence_fraction": 0.95,
    "language": "en",
}
FIXED = ["dataset=alpaca", "trainer.max_steps=10", "evaluation.max_records=100"]


def state(value: float, *overrides: str, status: str = DONE, name: str = "") -> State:
    metrics: dict[str, float | None] = {SETTINGS["objective"]: value, "tuned.exact_match": 0.5}
    identity = "".join(filter(str.isalnum, "".join(overrides)))
    return State(identity, name or identity, list(overrides), status=status, metrics=metrics)


def ranked(*states: State) -> list[Row]:
    return rank(states, SETTINGS)


def test_swept_keys_have_several_values() -> None:
    words = [*FIXED, "lora.r=8,16", "seed=range(1,4)", "lora.lora_alpha=choice(16)", "+x.y=1,1",
             "trainer.learning_rate=tag(log,interval(1e-4,3e-2))", "lora=glob(*)"]  # fmt: skip
    found = swept_values(words, CONF)
    assert list(found) == ["lora.r", "seed", RATE, "lora"]
    assert found["lora.r"] == ("8", "16") and found["seed"] == ("1", "2", "3")
    assert [float(end) for end in found[RATE]] == [1e-4, 3e-2]


@pytest.mark.parametrize(
    ("overrides", "swept", "name"),
    [
        ([*FIXED, f"{RATE}=1e-4", "lora.r=8"], (RATE, "lora.r"), "learning_rate=1e-4-r=8-id"),
        ([*FIXED, f"{RATE}=0.0012345678"], (RATE,), "learning_rate=0.00123-id"),
        ([f"{RATE}=4.0e-05", "lora.r=123456"], (RATE, "lora.r"), "learning_rate=4.0e-5-r=123456-id"),
        (["trainer.weight_decay=1e+05"], ("trainer.weight_decay",), "weight_decay=1e5-id"),
        (["trainer.weight_decay=123456.7"], ("trainer.weight_decay",), "weight_decay=1.23e5-id"),
        (["model=a", "trainer.seed=1", "dataset.seed=2"], ("trainer.seed", "dataset.seed"),
         "trainer.seed=1-dataset.seed=2-id"),
        (["lora.r=8", "seed=1"], (), "r=8-seed=1-id"),
    ],
)  # fmt: skip
def test_a_trial_is_named_after_what_is_swept(
    overrides: list[str], swept: tuple[str, ...], name: str
) -> None:
    assert name_of(overrides, "id", swept) == name


def test_words_of_a_trial_keep_texts_as_they_are() -> None:
    assert distinct(["dataset.path=data/own/a=b.csv"], ()) == ["path=data/own/a=b.csv"]
    assert short_keys(["lora.r", "a.seed", "b.seed"]) == {
        "lora.r": "r",
        "a.seed": "a.seed",
        "b.seed": "b.seed",
    }


def printed(rows: list[Row], swept: tuple[str, ...], **settings: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=160, highlight=False)
    print_ranking(rows, {**SETTINGS, **settings}, console, [], swept)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_ranking_has_a_column_for_each_swept_key_in_full_precision() -> None:
    values = {"0.0012345678": 0.1, "0.2": 0.3}
    rows = ranked(
        *(
            state(loss, *FIXED, f"{RATE}={rate}", "lora.target_modules=[q_proj]", f"seed={seed}")
            for rate, loss in values.items()
            for seed in (1, 2)
        )
    )
    lines = printed(rows, (RATE, "lora.target_modules", "seed"))
    assert lines[0].split() == ["train.validation_loss", "n", "tuned.exact_match", "learning_rate",
                                "target_modules", "experiment"]  # fmt: skip
    assert lines[1].split()[-4:-1] == ["0.5", "0.0012345678", "[q_proj]"]
    assert "max_steps" not in lines[0]


def test_an_objective_that_is_a_column_too_is_shown_once() -> None:
    columns = [SETTINGS["objective"], "tuned.exact_match"]
    lines = printed(ranked(state(0.1, "lora.r=8")), ("lora.r",), columns=columns)
    assert lines[0].split() == ["train.validation_loss", "tuned.exact_match", "r", "experiment"]


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    """A screen without a terminal, of a sweep over learning rates."""
    made = Screen(tmp_path, SETTINGS, 3, (RATE,))
    made.console = Console(file=io.StringIO(), width=160, highlight=False)
    return made


def said(screen: Screen) -> list[str]:
    assert isinstance(screen.console.file, io.StringIO)
    return screen.console.file.getvalue().splitlines()


def test_progress_shows_what_is_swept_and_where_a_trial_was_found(screen: Screen) -> None:
    done = state(0.1, *FIXED, f"{RATE}=0.1")
    own = name_of(done.overrides, done.identity, (RATE,))
    done.name = own
    found = state(0.2, *FIXED, f"{RATE}=0.2", status=CACHED, name="max_steps=10-id")
    failed = state(0.2, *FIXED, f"{RATE}=[0.3]", status=FAILED)
    screen._tell([done, found, failed])
    lines = said(screen)
    assert own.startswith("learning_rate=0.1-") and lines[0] == f"started {own}  (1/3)"
    assert lines[1] == f"1/3  {own}  0.1  (0 s)"
    assert lines[2].startswith("2/3  learning_rate=0.2-")
    assert lines[2].endswith("0.2  (had it as max_steps=10-id)")
    assert lines[4].startswith("failed  learning_rate=-0.3-")


def test_the_live_table_shows_what_is_swept(screen: Screen) -> None:
    running = state(0.1, *FIXED, f"{RATE}=0.1", status=RUNNING)
    screen.console.print(screen._table([running]))
    assert "learning_rate=0.1" in said(screen)[-1] and "max_steps" not in said(screen)[-1]


def test_a_sweep_without_a_terminal_gives_signs_of_life(
    tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = state(0.1, *FIXED, f"{RATE}=0.1", status=RUNNING)
    running.write(tmp_path, stage="train", name="learning_rate=0.1-x")
    screen._tell([running])
    monkeypatch.setattr(display, "SECONDS_BETWEEN_SIGNS", 3600)
    screen._give_sign_of_life([running])
    assert len(said(screen)) == 1
    monkeypatch.setattr(display, "SECONDS_BETWEEN_SIGNS", 0.1)
    monkeypatch.setattr(display, "_SECONDS_BETWEEN_LOOKS", 0.15)
    with screen.shown():
        time.sleep(0.6)
    signs = said(screen)[1:]
    own = name_of(running.overrides, running.identity, (RATE,))
    assert len(signs) >= 2
    assert set(signs) == {f"0 of 3 ended, 1 running, 0 waiting: {own} (train)"}
    many = [state(0.1, f"{RATE}=0.{i}", status=RUNNING) for i in range(1, 8)]
    screen._last_line = 0.0
    screen._give_sign_of_life(many)
    assert "7 running" in said(screen)[-1] and said(screen)[-1].endswith(", 3 more")


def notes(values: dict[str, float], key: str, **settings: Any) -> list[str]:
    """The remarks on a sweep over a key, by the objective of each value."""
    rows = ranked(*(state(loss, *FIXED, f"{key}={value}") for value, loss in values.items()))
    return remarks(rows, {**SETTINGS, **settings}, {key: tuple(values)})


def test_a_best_value_at_the_edge_of_the_grid_asks_for_more() -> None:
    assert notes({"4": 3.0, "8": 2.0, "16": 1.0}, "lora.r") == [
        "lora.r=16 is the largest value tried: try larger ones."
    ]
    assert notes({"1e-4": 1.0, "1e-3": 2.0}, RATE) == [
        f"{RATE}=1e-4 is the smallest value tried: try smaller ones."
    ]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"4": 3.0, "8": 1.0, "16": 2.0}, "lora.r"),  # between others
        ({"8": 1.0, "16": 1.0}, "lora.r"),  # two are the best
        ({"8": 1.0, "8.0": 2.0}, "lora.r"),  # one number
        ({"1": 1.0, "2": 2.0}, "lora.r"),  # the smallest rank that exists
        ({"0.0": 1.0, "0.1": 2.0}, "lora.lora_dropout"),
        ({"adamw": 1.0, "qlora": 2.0}, "trainer"),
        ({"1": 1.0, "2": 2.0}, "dataset.seed"),
    ],
)
def test_no_edge_is_mentioned_without_reason(values: dict[str, float], key: str) -> None:
    assert notes(values, key) == []


def test_a_failed_trial_beyond_the_best_is_an_edge_already_tried() -> None:
    rows = ranked(state(2.0, "lora.r=8"), state(1.0, "lora.r=16"))
    assert remarks(rows, SETTINGS, {"lora.r": ("8", "16", "64")}) == []


def test_a_winner_of_the_test_split_is_called_optimistic() -> None:
    scores = {"tuned.exact_match": 0.5}
    rows = rank(
        [State(n, n, [f"lora.r={n}"], status=DONE, metrics=dict(scores)) for n in ("8", "16")],
        {**SETTINGS, "objective": "tuned.exact_match"},
    )
    of = {**SETTINGS, "objective": "tuned.exact_match"}
    assert "optimistic" in remarks(rows, of, {"lora.r": ("8", "16")})[-1]
    assert remarks(rows[:1], of, {}) == []
