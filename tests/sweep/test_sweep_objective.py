"""The objective of a sweep: its direction, its metric, and the warning of the test split."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from sweeping import plan_in

from capas.config.hydra_overrides import check_points
from capas.core.errors import CapasError
from capas.sweep.objective import natural_direction
from capas.sweep.task import Task, defaults, prepare


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with conf/ and dvc.yaml."""
    monkeypatch.setenv("CAPAS_SWEEP", "/nowhere")
    return plan_in(tmp_path).home


def without_intervals(words: list[str]) -> list[str]:
    """Leave the values out that only a multirun can compose."""
    return [word for word in words if not word.startswith("lora.")]


def task_of(home: Path, *words: str) -> Task:
    return prepare(home, ["lora.r=4,8", *words], True)


@pytest.mark.parametrize(
    ("objective", "direction"),
    [
        ("train.validation_loss", "minimize"),
        ("tuned.loss", "minimize"),
        ("tuned.perplexity", "minimize"),
        ("tuned.empty_rate", "minimize"),
        ("tuned.copied_value_rate", "minimize"),
        ("tuned.label_accuracy", "maximize"),
        ("tuned.label_accuracy_gain_low", "maximize"),
        ("tuned.label_balanced_accuracy", "maximize"),
        ("tuned.label_macro_f1", "maximize"),
        ("tuned.label_log_loss", "minimize"),
        ("tuned.label_calibration_error", "minimize"),
        ("tuned.exact_match", "maximize"),
        ("tuned.exact_match_gain_low", "maximize"),
        ("tuned.stop_rate", "maximize"),
        ("train.validation_token_accuracy", "maximize"),
        ("tuned.politeness", "maximize"),
        ("tuned.toxic_loss", "maximize"),
        ("mine.politeness", None),
        ("train.num_steps", None),
        ("mine.glossy", None),
    ],
)
def test_the_direction_follows_from_the_metric(objective: str, direction: str | None) -> None:
    of_the_user = ("politeness", "toxic_loss")  # a metric of the evaluation, whatever its name
    assert natural_direction(objective, of_the_user) == direction


@pytest.mark.parametrize(
    ("objective", "direction"),
    [("tuned.exact_match", "maximize"), ("train.validation_loss", "minimize")],
)
def test_ranking_and_optuna_get_the_direction_that_auto_stands_for(
    home: Path, objective: str, direction: str
) -> None:
    task = task_of(home, "sweep=optuna", f"sweep.objective={objective}")
    assert task.settings["direction"] == direction
    with initialize_config_dir(str(home / "conf"), version_base="1.3"):
        config = compose("sweep", overrides=without_intervals(task.words), return_hydra_config=True)
    assert config.hydra.sweeper.direction == direction


def test_a_function_of_the_user_is_maximized(home: Path) -> None:
    own = "evaluation.metrics=[conf/own/scores.py:politeness]"
    task = task_of(home, own, "sweep.objective=tuned.politeness", "sweep.columns=[]")
    assert task.settings["direction"] == "maximize"


def test_the_headline_metric_is_the_column_unless_others_are_named(home: Path) -> None:
    own = "evaluation.metrics=[conf/own/scores.py:politeness]"
    assert task_of(home, own, "sweep.objective=tuned.politeness").settings["columns"] == ["auto"]
    both = task_of(home, "sweep.columns=[auto,tuned.stop_rate]")
    assert both.settings["columns"] == ["auto", "tuned.stop_rate"]
    with pytest.raises(CapasError, match=r"sweep\.columns"):
        task_of(home, "sweep.columns=[best]")


def test_a_metric_of_unknown_direction_asks_for_it(home: Path) -> None:
    asks = r"train.num_steps: whether lower .* Add sweep.direction=minimize or sweep.direction=max"
    with pytest.raises(CapasError, match=asks):
        task_of(home, "sweep.objective=train.num_steps")
    stated = ("sweep.objective=train.num_steps", "sweep.direction=minimize")
    assert task_of(home, *stated).warnings == []


def test_a_contradicting_direction_is_warned_of_and_kept(home: Path) -> None:
    task = task_of(home, "sweep.direction=maximize")
    assert task.settings["direction"] == "maximize"
    assert task.words.count("sweep.direction=maximize") == 1
    (warning,) = task.warnings
    assert (
        "ranks the worst trial first: train.validation_loss is better when it is lower" in warning
    )
    assert task_of(home, "sweep.direction=minimize").warnings == []


def test_a_choice_by_the_test_split_is_warned_of(home: Path) -> None:
    (warning,) = task_of(home, "sweep.objective=tuned.exact_match").warnings
    assert "chooses by the test split" in warning and "train.validation_loss" in warning
    single = prepare(home, ["sweep.objective=tuned.exact_match"], False)
    assert single.warnings == []


def test_a_search_in_another_direction_than_the_ranking_is_refused(home: Path) -> None:
    for words in (["sweep=optuna", "hydra.sweeper.direction=maximize"], ["hydra/sweeper=optuna"]):
        with pytest.raises(CapasError, match=r"optimise in the direction of the ranking"):
            task_of(home, *words)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("sweep.objective=tuned.exact_mach", "did you mean tuned.exact_match?"),
        ("sweep.objective=train.loss", "did you mean train.train_loss?"),
        ("sweep.objective=tuned.validation_loss", "did you mean train.validation_loss?"),
        ("sweep.objective=tunde.loss", "did you mean tuned.loss?"),
        ("sweep.columns=[tuned.stop_rat]", "did you mean tuned.stop_rate?"),
    ],
)
@pytest.mark.parametrize("other", [(), ("lora.alpha=4,8",)])
def test_a_misspelt_metric_is_refused_with_the_nearest_name(
    home: Path, word: str, meant: str, other: tuple[str, ...]
) -> None:
    with pytest.raises(CapasError) as refused:
        task_of(home, word, *other)
    assert meant in str(refused.value)
    assert ("did you mean lora.lora_alpha?" in str(refused.value)) is bool(other)


def test_a_metric_that_only_another_evaluation_computes_is_no_mistake_yet(home: Path) -> None:
    words = ("evaluation=summaries,nothing", "sweep.objective=tuned.rougeL")
    with pytest.raises(CapasError) as refused:
        task_of(home, *words)
    assert "no such option" in str(refused.value) and "rougeL" not in str(refused.value)


def test_a_misspelt_key_gets_one_answer_swept_or_fixed(home: Path) -> None:
    for word in ("lora.rank=8", "lora.rank=8,16"):
        with pytest.raises(CapasError, match=r"lora.rank: no such key; did you mean lora.r\?"):
            prepare(home, ["trainer.learning_rate=1e-3,1e-2", word], True)


def test_every_trial_of_a_large_grid_is_checked(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {**check_points.__kwdefaults__, "limit": 3}
    monkeypatch.setattr(check_points, "__kwdefaults__", small)
    assert task_of(home, "seed=1,2,3").expected == 6
    with pytest.raises(CapasError, match=r"together less than 1"):  # each value alone is right
        task_of(home, "dataset.validation_fraction=0.1,0.6", "dataset.test_fraction=0.1,0.6")


@pytest.mark.parametrize("key", ["hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir"])
def test_a_folder_of_hydra_is_refused(home: Path, key: str) -> None:
    with pytest.raises(CapasError, match=rf"{key}=x: has no effect. A sweep keeps its files in"):
        task_of(home, f"{key}=x")


def test_the_default_is_known_by_its_values(home: Path) -> None:
    """lora.r=16 is conf/'s; which seeds replicate it does not matter, nor what is fixed for all."""
    task = prepare(home, ["lora.r=8,16", "seed=1,2", "trainer.max_steps=3"], True)
    found = defaults(task)
    assert {words[0] for words in found} == {"lora.r=16"} and len(found) == 2
    groups = prepare(home, ["chat_template=chatml,llama3", "lora.r=16"], True)
    assert [words[0] for words in defaults(groups)] == ["chat_template=chatml"]
    assert defaults(task_of(home)) == []


@pytest.mark.parametrize("seeds", ["1,2,3", "range(3)", "choice(1,2)"])
def test_a_search_over_seeds_is_refused(home: Path, seeds: str) -> None:
    """Optuna would keep the luckiest seed."""
    rates = "trainer.learning_rate=interval(1e-3,1e-1)"
    with pytest.raises(CapasError, match=rf"seed={re.escape(seeds)}: a search proposes each"):
        prepare(home, ["sweep=optuna", rates, f"seed={seeds}"], True)
    assert prepare(home, ["sweep=optuna", rates, "seed=1"], True).expected == 20
    assert prepare(home, [f"seed={seeds}"], True).expected > 1
