"""Successive halving: which trials go on, to which steps, and that a sweep started again decides the same.

The fakes of `sweeping` have their best learning rate at 0.01, and a loss that falls with the steps.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import pytest
from sweeping import Sweeper, kill, plan_in
from workspace import make_workspace

from capas.core.errors import CapasError
from capas.sweep.children import rung_points
from capas.sweep.rungs import (
    Ladder,
    Rung,
    fractions,
    is_among_best,
    metric_of,
    num_going_on,
    score_of,
    share_of_steps,
)
from capas.sweep.task import prepare
from capas.tracking.client import Point

NINE = "trainer.learning_rate=0.00001,0.0001,0.0005,0.001,0.005,0.01,0.03,0.05,0.1"
THREE = "trainer.learning_rate=0.001,0.01,0.1"  # 0.01 is best
TWO_RUNGS = ("-m", "sweep=halving", "sweep.rungs=2")
SETTINGS = {"rungs": 3, "reduction_factor": 3, "objective": "train.validation_loss"}


def trained(sweeper: Sweeper) -> Counter[str]:
    """{"1e-05 1/9": 1}: the rate and the rung of each training."""
    ran = sweeper.ran().items()
    return Counter({k.removeprefix("train "): n for k, n in ran if k.startswith("train ")})


def at(rung: str, *rates: float) -> list[str]:
    return [f"{rate:g} {rung}".strip() for rate in rates]


def ladders(folder: Path, losses: Iterable[float]) -> list[Ladder]:
    """Trials of a search that have reached the first of three rungs."""
    found = []
    for place, loss in enumerate(losses):
        ladder = Ladder.of(folder, str(place))
        ladder.rungs["1/9"] = Rung(3, 27, {"validation_loss": loss})
        ladder.write()
        found.append(ladder)
    return found


@pytest.mark.slow
def test_a_third_goes_on_at_each_rung(sweeper: Sweeper) -> None:
    code, printed = sweeper.sweep_here("-m", "sweep=halving", NINE)
    assert code == 0, printed
    rates = [1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 3e-2, 5e-2, 1e-1]
    expected = [*at("1/9", *rates), *at("1/3", 0.005, 0.01, 0.03), "0.01"]
    assert trained(sweeper) == Counter(expected)
    assert "successive halving, at most 26% of the steps of all" in printed
    assert (
        "step 3 of 27: 3 of 9 settings go on: learning_rate=0.01; learning_rate=0.005;" in printed
    )
    assert "step 9 of 27: 1 of 3 settings go on: learning_rate=0.01\n" in printed
    assert re.search(r"–\s+\(0.9677 at step 9 of 27\) .* 0.005 ", printed)
    assert "6 at step 3 of 27, 2 at step 9 of 27. A setting that gains late" in printed
    assert re.search(r"dvc exp apply learning_rate=0.01-", printed)
    assert len(sweeper.experiments()) == 1


def test_the_same_sweep_again_trains_nothing_and_a_grid_trains_the_rest(sweeper: Sweeper) -> None:
    first = sweeper.sweep_here(*TWO_RUNGS, THREE)[1]
    sweeper.forget()
    code, again = sweeper.sweep_here(*TWO_RUNGS, THREE)
    assert code == 0 and trained(sweeper) == Counter()
    assert first.splitlines()[-6:] == again.splitlines()[-6:]
    assert (
        list((sweeper.root / ".dvc/tmp/sweep/work").glob("*")) == []
    )  # checkpoints alone are kept
    assert len(list((sweeper.root / ".dvc/tmp/sweep/checkpoints").glob("*/train-key"))) == 2
    assert sweeper.sweep_here("-m", THREE)[0] == 0
    assert trained(sweeper) == Counter(at("", 0.001, 0.1))


def test_the_values_of_conf_train_to_the_end_beside_the_best(sweeper: Sweeper) -> None:
    """The default of the learning rate is 0.004."""
    code, printed = sweeper.sweep_here(*TWO_RUNGS, "trainer.learning_rate=0.01,0.02,0.004,0.1")
    assert code == 0
    assert trained(sweeper) == Counter([*at("1/3", 0.01, 0.02, 0.004, 0.1), *at("", 0.01, 0.004)])
    assert "1 of 4 settings go on: learning_rate=0.01; the default, to compare with" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), ("hydra/launcher=submitit_local",)],
    ids=["joblib", "submitit"],
)
def test_all_seeds_of_a_setting_go_on(sweeper: Sweeper, launcher: tuple[str, ...]) -> None:
    """With workers side by side, which are told the numbers of the trials."""
    code, printed = sweeper.sweep_here(*TWO_RUNGS, THREE, "seed=1,2", *launcher)
    assert code == 0, printed
    assert trained(sweeper) == Counter(2 * [*at("1/3", 0.001, 0.01, 0.1), "0.01"])
    assert re.search(r"^ *1 +0\.015 ± 0\.06\d+ +2 ", printed, re.MULTILINE)


def test_a_failed_trial_is_reported_and_tried_again(sweeper: Sweeper) -> None:
    words = (*TWO_RUNGS, "trainer.learning_rate=0.001,0.01,0.9")
    code, printed = sweeper.sweep_here(*words)
    assert code == 1 and "1 of 3 trials failed" in printed and "the loss is nan" in printed
    assert "1 of 2 settings go on: learning_rate=0.01" in printed
    sweeper.forget()
    assert sweeper.sweep_here(*words)[0] == 1
    assert trained(sweeper) == Counter(at("1/3", 0.9))


@pytest.mark.slow
@pytest.mark.parametrize("held", ["train", "evaluate"])
def test_killed_at_a_rung_it_goes_on(sweeper: Sweeper, held: str) -> None:
    """The first is held in its first rung, the second behind the last rung."""
    sweeper.hold(held)
    process = sweeper.sweep_beside(*TWO_RUNGS, THREE)
    sweeper.wait_for(held)
    kill(process)
    sweeper.let_go()
    sweeper.wait_until_idle()
    before = trained(sweeper)
    assert sweeper.sweep_here(*TWO_RUNGS, THREE)[0] == 0
    repeated = "0.001 1/3" if held == "train" else "0.01"  # what was cut off
    once = Counter([*at("1/3", 0.001, 0.01, 0.1), "0.01"])
    assert trained(sweeper) == once + Counter([repeated])
    assert before[repeated] == 1
    assert len(sweeper.experiments()) == 1


@pytest.mark.slow
def test_a_search_drops_trials_and_proposes_the_same_again(sweeper: Sweeper) -> None:
    words = ("-m", "sweep=optuna", "sweep.rungs=2", "hydra.sweeper.n_trials=6",
             "hydra.sweeper.n_jobs=1", "trainer.learning_rate=tag(log,interval(1e-3,1e-1))")  # fmt: skip
    code, printed = sweeper.sweep_here(*words)
    assert code == 0, printed
    rungs = Counter(
        "1/3" if name.endswith("1/3") else "end" for name in trained(sweeper).elements()
    )
    assert rungs["1/3"] == 6 and rungs["end"] == 6 - printed.count("(dropped at step 9 of 27")
    assert 1 <= rungs["end"] < 6
    sweeper.forget()
    code, again = sweeper.sweep_here(*words)
    assert code == 0 and trained(sweeper) == Counter()
    assert again.count("(dropped at step 9 of 27") == 6 - rungs["end"]


@pytest.mark.slow
def test_a_survivor_has_the_bytes_of_the_same_trial_run_alone(tmp_path: Path) -> None:
    words = ("-m", "experiment=quick", "trainer.max_steps=36", "tracking=none")
    halved = Sweeper(make_workspace(tmp_path / "halved").root)
    printed = halved.sweep(*words, "sweep=halving", "trainer.learning_rate=0.00001,0.003,0.002")
    assert "step 4 of 36: 1 of 3 settings go on" in printed
    alone = Sweeper(make_workspace(tmp_path / "alone").root)
    for name in halved.experiments():
        (rate,) = re.findall(r"learning_rate=([\d.]+)-", name)
        alone.sweep(*words, f"trainer.learning_rate={rate}")
        (same,) = (other for other in alone.experiments() if other.endswith(name[-10:]))
        outs = [{o["path"]: o["md5"] for o in s.lock(n)["train"]["outs"]}
                for s, n in ((halved, name), (alone, same))]  # fmt: skip
        assert outs[0] == outs[1]
    assert len(halved.experiments()) == 1


def test_rungs_are_powers_of_the_factor() -> None:
    assert fractions(SETTINGS) == [Fraction(1, 9), Fraction(1, 3)]
    assert fractions({"rungs": 4, "reduction_factor": 2}) == [
        Fraction(1, 8),
        Fraction(1, 4),
        Fraction(1, 2),
    ]
    assert fractions({**SETTINGS, "rungs": None}) == []
    assert [num_going_on(count, 3) for count in (1, 2, 3, 8, 9, 20)] == [1, 1, 1, 2, 3, 6]


def test_the_share_of_the_steps_by_hand() -> None:
    """9 x 1/9 + 3 x 2/9 + 1 x 2/3 = 7/3 of 9; the default adds 2/9 + 2/3."""
    assert share_of_steps(9, SETTINGS, with_default=False) == Fraction(7, 27)
    assert share_of_steps(9, SETTINGS, with_default=True) == Fraction(7 * 3 + 2 + 6, 81)
    assert share_of_steps(1, SETTINGS, with_default=True) == 1


def test_a_rung_is_decided_by_the_objective_if_a_pause_knows_it() -> None:
    accuracy = {**SETTINGS, "objective": "train.validation_token_accuracy"}
    rung = Rung(3, 27, {"validation_loss": 0.5, "validation_token_accuracy": 0.8})
    assert score_of(rung, SETTINGS) == 0.5 and score_of(rung, accuracy) == -0.8
    assert metric_of({**SETTINGS, "objective": "tuned.exact_match"}) == "train.validation_loss"


@pytest.mark.parametrize(
    ("losses", "goes_on"),
    [([3.0], True), ([3.0, 2.0], True), ([1.0, 2.0], False), ([1, 2, 3, 4, 5, 1.5], True),
     ([1, 2, 3, 4, 1.5], False)],
)  # fmt: skip
def test_a_trial_of_a_search_is_compared_with_those_before_it(
    tmp_path: Path, losses: list[float], goes_on: bool
) -> None:
    *_, last = ladders(tmp_path, losses)
    assert is_among_best(tmp_path, last, Fraction(1, 9), SETTINGS) == goes_on


def test_a_ladder_is_read_as_it_was_written(tmp_path: Path) -> None:
    (ladder,) = ladders(tmp_path, [2.0])
    ladder.rungs["1/3"] = Rung(9, 27, {"validation_loss": 1.0})
    ladder.dropped_at, ladder.train_key, ladder.seconds = "1/3", "key", 1.5
    ladder.write()
    assert Ladder.of(tmp_path, "0") == ladder
    assert ladder.last == ladder.rungs["1/3"]
    curve = [Point("rung/validation_loss", 3, 2.0), Point("rung/validation_loss", 9, 1.0)]
    assert rung_points(ladder) == curve


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("sweep.rungs=1", THREE), r"sweep.rungs=1: .*greater than or equal to 2"),
        (("sweep=halving", "sweep.reduction_factor=1", THREE), r"sweep.reduction_factor=1: "),
        (("sweep=templates", "sweep.rungs=3"), r"sweep.cross_templates=true compares the models"),
        (
            ("sweep=optuna", "sweep.rungs=2", "sweep.objective=tuned.exact_match",
             "trainer.learning_rate=interval(1e-3,1e-1)"),
            r"sweep.objective=tuned.exact_match is not known before a training has ended",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_halved_is_refused(
    tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    plan = plan_in(tmp_path)
    with pytest.raises(CapasError, match=sentence):
        prepare(plan.home, list(words), True)


def test_a_single_trial_is_not_halved(sweeper: Sweeper) -> None:
    assert sweeper.sweep_here("-m", "sweep=halving", "trainer.learning_rate=0.01")[0] == 0
    assert trained(sweeper) == Counter(at("", 0.01))


def test_losses_of_the_fakes_fall_with_the_steps() -> None:
    """What the tests above rest on: the order of the rates is the same at each rung."""
    losses = [abs(math.log10(rate) + 2) for rate in (0.01, 0.005, 0.03, 0.05)]
    assert losses == sorted(losses)
