"""The parts of a sweep, one by one."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from sweeping import plan_in, wait

from capas.core.cores import MAX_THREADS
from capas.core.errors import CapasError
from capas.core.locks import BusyError, exclusive
from capas.core.process import follow
from capas.core.stage import CHECKPOINTS
from capas.evaluation.names import LABEL_SCORES
from capas.sweep import driver
from capas.sweep.lesson import lesson
from capas.sweep.names import name_of
from capas.sweep.outlook import in_words, seconds_of_all
from capas.sweep.plan import AT_ONCE, Plan
from capas.sweep.point import Point, num_workers
from capas.sweep.produced import keys_of, not_produced
from capas.sweep.ranking import Row, rank
from capas.sweep.shared import stage_keys
from capas.sweep.slots import place, some_of, visible_gpus
from capas.sweep.state import DONE, FAILED, RUNNING, State, read_states
from capas.sweep.task import Task, is_of_sweep, prepare
from capas.sweep.verdict import verdict
from capas.sweep.workspace import lay_out

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = {
    "objective": "train.loss",
    "direction": "minimize",
    "columns": ["tuned.score"],
    "replicates": ["seed"],
    "confidence_fraction": 0.95,
}


def state(value: float, *overrides: str, status: str = DONE) -> State:
    metrics = {"train.loss": value, "tuned.score": 10 * value}
    name = "-".join(overrides)
    return State(name, name, list(overrides), status=status, metrics=metrics)


def ranked(*states: State, **settings: Any) -> list[Row]:
    return rank(states, {**SETTINGS, **settings})


def test_the_best_is_first_in_either_direction() -> None:
    states = [state(2.0, "r=1"), state(1.0, "r=2"), state(3.0, "r=3", status=FAILED)]
    assert [row.overrides for row in ranked(*states)] == [["r=2"], ["r=1"]]
    assert [row.overrides for row in ranked(*states, direction="maximize")] == [["r=1"], ["r=2"]]


def test_seeds_are_one_row_with_the_interval_of_their_mean() -> None:
    (row,) = ranked(*(state(v, "r=1", f"seed={i}") for i, v in enumerate((1.0, 2.0, 3.0))))
    assert (row.mean, row.column("tuned.score"), row.name) == (2.0, 20.0, "r=1-seed=0")
    assert row.margin == pytest.approx(2.4841, abs=1e-4)  # 4.3027 * 1 / sqrt(3)


@pytest.mark.parametrize(
    ("first", "second", "tied"),
    [
        ((1.0, 2.0, 3.0), (1.1, 2.1, 3.1), False),  # the same seeds: always worse
        ((1.0, 2.0, 3.0), (1.1, 1.9, 3.2), True),
        ((1.0, 1.1, 1.2), (9.0, 9.1, 9.2), False),
    ],
)
def test_a_setting_that_may_be_the_best_is_tied_with_the_first(
    first: tuple[float, ...], second: tuple[float, ...], tied: bool
) -> None:
    rows = ranked(*trials({"r=1": first, "r=2": second}))
    assert [row.rank for row in rows] == ([1, 1] if tied else [1, 2])
    assert ("2 settings may be the best" in verdict(rows, SETTINGS)) is tied
    assert ("The first is better than every other" in verdict(rows, SETTINGS)) is not tied


def trials(settings: dict[str, tuple[float, ...]]) -> list[State]:
    """A trial for each value, with the seeds 0, 1, ..."""
    return [
        state(value, name, f"seed={seed}")
        for name, values in settings.items()
        for seed, value in enumerate(values)
    ]


def test_a_row_without_all_seeds_never_wins() -> None:
    """On pure noise it won whenever its single trial was lucky."""
    states = [
        *trials({"r=1": (1.0, 1.2, 1.1), "r=2": (1.3, 1.1, 1.2)}),
        state(0.1, "r=3", "seed=0"),
    ]
    rows = ranked(*states)
    assert [(row.name, row.rank) for row in rows][2] == ("r=3-seed=0", 0)
    assert rows[2].missing == (("seed=1",), ("seed=2",))
    assert not rows[2].tied
    shown = verdict(rows, SETTINGS)
    assert "Not compared: r=3-seed=0, for lack of seed=1, seed=2." in shown
    assert "2 settings may be the best" in shown
    alone = ranked(*trials({"r=1": (1.0, 1.2)}), state(0.1, "r=3", "seed=0"))
    assert "better" not in verdict(alone, SETTINGS)
    apart = ranked(state(1.0, "r=1", "seed=0"), state(0.5, "r=2", "seed=1"))
    assert "none can be compared with another" in verdict(apart, SETTINGS)
    assert [row.rank for row in apart] == [0, 0]


def test_the_first_is_compared_with_the_default() -> None:
    near = {"r=1": (1.0, 1.2, 1.1), "r=2": (1.1, 1.1, 1.2), "r=3": (1.2, 1.1, 1.0)}
    states = trials(near)
    rows = rank(states, SETTINGS, [("r=2", "seed=0")])
    assert [row.is_default for row in sorted(rows, key=lambda row: row.name)] == [
        False,
        True,
        False,
    ]
    shown = verdict(rows, SETTINGS)
    assert "No setting is shown to be better than the default. A gain of 0." in shown
    assert "too good by about 0.0" in shown and "other seeds than these 3" in shown
    assert "The values of conf/ were not among them" in verdict(ranked(*states), SETTINGS)
    better = rank(trials({**near, "r=4": (0.1, 0.2, 0.15)}), SETTINGS, [("r=2", "seed=1")])
    assert "The first is better than the default by 0.98" in verdict(better, SETTINGS)
    best = rank(trials({**near, "r=4": (0.1, 0.2, 0.15)}), SETTINGS, [("r=4",)])
    shown = verdict(best, SETTINGS)
    assert "The first, the default, is better than every other setting" in shown
    assert "No setting is better than the default. A gain of" in shown


def test_single_trials_tie_only_where_they_are_equal() -> None:
    rows = ranked(state(1.0, "r=1"), state(1.0, "r=2"), state(1.1, "r=3"), state(1.1, "r=4"))
    assert [row.rank for row in rows] == [1, 1, 3, 3]
    assert "2 rows are equal (=1). One trial each" in verdict(rows, SETTINGS)
    assert "seed=1,2,3" in verdict(ranked(state(1.0, "r=1"), state(1.1, "r=2")), SETTINGS)
    same = ranked(*(state(1.0, f"r={i}") for i in range(12)))
    assert verdict(same, SETTINGS).startswith(
        "No setting is better: all 12 have the same train.loss"
    )


def test_a_missing_number_is_shown_as_missing() -> None:
    found = state(1.0, "r=1")
    found.metrics["tuned.score"] = None
    assert ranked(found)[0].column("tuned.score") is None


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["trainer.learning_rate=1e-4", "lora.r=8"], "learning_rate=1e-4-r=8-id"),
        (["lora.target_modules=[q_proj,v_proj]"], "target_modules=-q_proj-v_proj-id"),
        (["+trainer.x=a..b", "model=x/y"], "x=a.b-model=x-y-id"),
        ([], "point-id"),
        (["dataset.path=" + "a" * 99], f"path={'a' * 55}-id"),
    ],
)
def test_names_are_those_of_git_references(overrides: list[str], name: str) -> None:
    assert name_of(overrides, "id") == name
    check = ["git", "check-ref-format", f"refs/exps/aa/bb/{name}"]
    assert subprocess.run(check, check=False).returncode == 0


def test_what_is_of_the_sweep_is_no_part_of_a_point() -> None:
    words = ("sweep=optuna", "sweep.keep=true", "+sweep.x=1", "~sweep.columns")
    assert all(is_of_sweep(word) for word in words)
    assert not any(is_of_sweep(word) for word in ("sweeping=1", "lora.sweep=1"))


def test_points_at_once_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capas.sweep.point.usable_cores", lambda: 6)
    target = {"_target_": "hydra...SomeLauncher"}
    assert num_workers({**target, "n_jobs": 3}) == 3
    assert num_workers({**target, "n_jobs": -1}) == 6
    assert num_workers(target) == 1
    assert num_workers({"_target_": "hydra_plugins.hydra_submitit_launcher.LocalLauncher"}) == 6


@pytest.mark.parametrize(("workers", "threads"), [(1, "6"), (2, "3"), (4, "1"), (9, "1")])
def test_cores_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, threads: str
) -> None:
    monkeypatch.setattr("capas.sweep.slots.usable_cores", lambda: 6)
    with place(tmp_path.joinpath, "cpu", workers) as variables:
        assert variables == {MAX_THREADS: threads}


def test_each_point_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-ab")
    with place(tmp_path.joinpath, "cuda", 1) as one, place(tmp_path.joinpath, "cuda", 1) as other:
        assert one == {"CUDA_VISIBLE_DEVICES": "3"}
        assert other == {"CUDA_VISIBLE_DEVICES": "GPU-ab"}
        third: list[str] = []

        def take() -> None:
            with some_of(tmp_path.joinpath, "gpu", ["3", "GPU-ab"], 1) as names:
                third.extend(names)

        waiting = threading.Thread(target=take)
        waiting.start()
        time.sleep(0.5)
        assert third == []
    waiting.join(timeout=10)
    assert len(third) == 1


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        ({"_target_": "hydra_plugins.x.SlurmLauncher"}, {}),
        # Inside of a job of SLURM, but not one job for each point.
        ({"_target_": "hydra_plugins.x.JoblibLauncher", "n_jobs": -1}, {MAX_THREADS: "3"}),
        ({"_target_": "hydra_plugins.hydra_submitit_launcher.LocalLauncher"}, {MAX_THREADS: "3"}),
        ({"_target_": "hydra_plugins.x.JoblibLauncher", "n_jobs": 1}, {MAX_THREADS: "6"}),
    ],
)
def test_a_point_takes_its_share_but_for_a_job_that_has_it(
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    launcher: dict[str, Any],
    variables: dict[str, str],
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(AT_ONCE, "2")
    monkeypatch.setattr("capas.sweep.slots.usable_cores", lambda: 6)
    monkeypatch.setattr("capas.sweep.point.usable_cores", lambda: 6)
    point = Point(plan, [], {"hardware": hardware_of("cpu")}, {}, launcher)
    with point._place() as given:
        assert given == variables


def hardware_of(device: str, num_processes: int = 1, num_machines: int = 1) -> dict[str, Any]:
    return {"device": device, "num_processes": num_processes, "num_machines": num_machines}


def test_a_point_of_two_processes_has_two_gpus_or_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    taken: list[str] = []

    def take() -> None:
        with place(tmp_path.joinpath, "cuda", 1, 2) as variables:
            taken.append(variables["CUDA_VISIBLE_DEVICES"])

    with place(tmp_path.joinpath, "cuda", 1, 2) as first:
        assert first == {"CUDA_VISIBLE_DEVICES": "0,1"}
        points = [threading.Thread(target=take) for _ in range(3)]  # each could hold one and wait
        for point in points:
            point.start()
        time.sleep(1)
        assert taken == []
    for point in points:
        point.join(timeout=20)
    assert len(taken) == 3
    assert all(len(set(gpus.split(","))) == 2 for gpus in taken)


def test_the_processes_of_a_point_share_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capas.sweep.slots.usable_cores", lambda: 8)
    with place(tmp_path.joinpath, "cpu", 2, 2) as variables:
        assert variables == {MAX_THREADS: "2"}


@pytest.mark.parametrize(
    ("hardware", "gpus", "message"),
    [
        (hardware_of("cuda", 4), 1, "hydra.launcher.gpus_per_node=1. Set gpus_per_node to 4"),
        (hardware_of("cuda", 4, 2), 4, "num_machines=2: a trial of a sweep runs on one machine"),
    ],
)
def test_a_job_with_too_few_gpus_is_refused(
    plan: Plan, hardware: dict[str, Any], gpus: int, message: str
) -> None:
    launcher = {"_target_": "hydra_plugins.x.SlurmLauncher", "gpus_per_node": gpus}
    with pytest.raises(CapasError, match=message):
        Point(plan, [], {"hardware": hardware}, {}, launcher)._place()


def test_more_processes_than_gpus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with (
        pytest.raises(CapasError, match=r"num_processes=3, .*visible here: 0, 1"),
        place(tmp_path.joinpath, "cuda", 1, 3),
    ):
        pass


def test_no_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(CapasError, match="no GPU is visible here"):
        visible_gpus()
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 0\necho 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    assert visible_gpus() == ["0", "1"]


@pytest.fixture(scope="module")
def keys() -> Callable[..., dict[str, str]]:
    def of(*overrides: str) -> dict[str, str]:
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            values = OmegaConf.to_container(
                compose("config", overrides=list(overrides)), resolve=True
            )
        assert isinstance(values, dict)
        return stage_keys(values, "inputs", REPOSITORY)

    return of


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("trainer.learning_rate=1e-3", {"train", "evaluate", "sample", "report"}),
        ("evaluation.max_new_tokens=8", {"evaluate_base", "evaluate", "report"}),
        ("tracking=none", set()),
        ("quantization=int8",
         {"quantize", "evaluate_base", "train", "evaluate", "sample", "report"}),
    ],
)  # fmt: skip
def test_the_key_of_a_stage_changes_with_what_it_rests_on(
    keys: Callable[..., dict[str, str]], override: str, changed: set[str]
) -> None:
    before, after = keys(), keys(override)
    assert {name for name in before if before[name] != after[name]} == changed
    assert not {"compose", "publish"} & before.keys()


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Of a repository with conf/, and points of a sweep that has just begun."""
    monkeypatch.setenv("CAPAS_SWEEP", "/nowhere")
    made = plan_in(tmp_path)
    made.points.mkdir(parents=True)
    return made


def test_a_glob_is_all_choices_but_the_base_of_the_group(plan: Plan) -> None:
    words = ["lora=glob(*)", "model=glob(llama*,exclude=*8b*)", "seed=1,2", "quantization=none"]
    task = prepare(plan.home, words, True)
    models = "llama_3.2_1b_instruct,llama_3.2_3b_instruct"
    direction = "sweep.direction=minimize"
    given = ["lora=all_linear,attention,none", f"model={models}", *words[2:]]
    assert task.words == [*given, direction]
    assert (task.expected, task.at_once) == (12, 12)
    with pytest.raises(CapasError, match="no such option"):
        prepare(plan.home, ["lora=glob(x*)"], True)
    own = plan.home / "conf/own/lora/mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [_base, _self_]\npreset: mine\n")
    found = prepare(plan.home, ["lora=glob(*)", "quantization=none"], True).words
    assert found[0] == "lora=all_linear,attention,mine,none"


def test_a_search_proposes_as_many_at_once_as_it_says(plan: Plan) -> None:
    words = ["sweep=optuna", "lora.r=4,8", "hydra.sweeper.n_trials=7"]
    task = prepare(plan.home, words, True)
    assert (task.expected, task.at_once) == (7, 2)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("sweep.direction=maximise", "sweep.direction='maximise'"),
        ("sweep.language=fr", "sweep.language='fr'"),
        ("sweep.confidence_fraction=95", "sweep.confidence_fraction=95"),
        ("sweep.objective=loss", "sweep.objective='loss'"),
        ("sweep.objective=trained.loss", "FILE in FILE.KEY must be one of .*train, tuned"),
        ("sweep.columns=[tuend.loss]", "tuend.loss is not a metric"),
        ("sweep.replicates=[sed]", "'sed' is not a key"),
        ("+sweep.x=1", "sweep.x: no such key"),
    ],
)
def test_a_wrong_value_of_the_sweep_is_told_before_a_point_runs(
    plan: Plan, word: str, told: str
) -> None:
    with pytest.raises(CapasError, match=told):
        prepare(plan.home, ["lora.r=4,8", word], True)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("hydra.launcher.n_jobs=2", "hydra/launcher=joblib runs"),
        ("hydra/launcher=jobli", "hydra/launcher=jobli: no such option, or its package"),
        ("hydra/launcher=basic,joblib", "takes one value; it says how the whole sweep runs"),
        ("sweep.keep=true,false", "takes one value; it says how the whole sweep runs"),
        ("sweep=optna", "sweep=optna: no such option; did you mean optuna?"),
        ("sweep.objectiv=train.loss", "sweep.objectiv: no such key; did you mean sweep.objective?"),
        ("lora.rr=8,16", "lora.rr: no such key; did you mean lora.r?"),
        ("trainer.learning_rate=1e-3,x", "trainer.learning_rate='x': input should be a valid number"),
        ("evaluation=loss,json", "with evaluation.metrics=[]"),
    ],
)  # fmt: skip
def test_all_that_is_wrong_with_a_sweep_is_told_at_once(plan: Plan, word: str, told: str) -> None:
    words = ["lora.alpha=4,8", "sweep.objective=tuned.exact_match"]
    with pytest.raises(CapasError, match=re.escape(told)) as refused:
        prepare(plan.home, [*(words[1:] if "evaluation" in word else words), word], True)
    assert "evaluation" in word or "did you mean lora.lora_alpha?" in str(refused.value)


def test_a_search_checks_each_value_and_no_rule_between_them(plan: Plan) -> None:
    rates = "trainer.learning_rate=tag(log,interval(1e-4,3))"
    with pytest.raises(CapasError, match=r"trainer.learning_rate=3.0: input should be less than 1"):
        prepare(plan.home, ["sweep=optuna", rates], True)
    task = prepare(plan.home, ["sweep=optuna", "lora=all_linear,none"], True)
    assert task.searches and task.expected == 20


def test_an_overlay_may_choose_the_launcher(plan: Plan) -> None:
    lines = "# @package _global_\ndefaults: [override /hydra/launcher: joblib]\n"
    (plan.home / "conf/experiment/mine.yaml").write_text(f"{lines}experiment: {{preset: mine}}\n")
    task = prepare(plan.home, ["experiment=mine", "seed=1,2", "hydra.launcher.n_jobs=2"], True)
    assert task.launcher["_target_"].endswith("JoblibLauncher") and task.launcher["n_jobs"] == 2
    assert {"experiment=mine", "hydra.launcher.n_jobs=2"} <= {*task.common}
    assert "seed=1,2" not in task.common


def test_metrics_that_will_be_written_are_known_before(plan: Plan) -> None:
    [values] = (point.values for point in prepare(plan.home, [], True).points)
    for file, keys in keys_of(values).items():
        written = json.loads((REPOSITORY / f"reports/metrics/{file}.json").read_text())
        assert set(keys) == (set() if file == "base" else set(written))
    by_answers = {**values, "trainer": {"metric_for_best_model": "conf/x.py:tone"}}
    assert keys_of(by_answers)["train"] == [*keys_of(values)["train"], "validation_tone"]
    settings = {"objective": "tuned.rougeL", "columns": ["tuned.exact_match", "train.x"]}
    assert [key for key, _ in not_produced(settings, values)] == [
        "sweep.columns",
        "sweep.objective",
    ]
    values["evaluation"]["metrics"] = ["label_accuracy"]
    keys = keys_of(values)["tuned"]
    assert {"label_accuracy", "label_accuracy_gain_low", *LABEL_SCORES} < {*keys}
    assert "stop_rate" not in keys
    values["evaluation"]["metrics"] = "auto"
    assert list(not_produced({**settings, "columns": []}, values)) == []


def test_a_machine_that_lacks_a_gpu_runs_no_point_but_sends_jobs(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("capas.config.requirements.num_gpus", lambda: 0)
    task = prepare(plan.home, ["hardware=gpu", "lora.r=4,8"], True)
    for launcher in ("BasicLauncher", "JoblibLauncher", "LocalLauncher"):
        local = replace(task, launcher={"_target_": f"hydra_plugins.x.{launcher}"})
        with pytest.raises(CapasError, match=r"no trial was run:\n  hardware.device=cuda"):
            driver._check_machine(plan.home, local, task.points)
    with pytest.raises(CapasError, match="a trial of a sweep runs on one machine"):
        prepare(plan.home, ["hardware.num_machines=2", "hardware.num_processes=2,4"], True)
    driver._check_machine(plan.home, task, [])
    slurm = replace(task, launcher={"_target_": "hydra_plugins.x.SlurmLauncher"})
    driver._check_machine(plan.home, slurm, task.points)
    assert (
        "this machine lacks it, but the launcher's machine may have it: hardware.device"
        in caplog.text
    )


def timed(home: Path, **seconds: float) -> None:
    folder = home / "reports/timings"
    folder.mkdir(parents=True, exist_ok=True)
    for stage, value in seconds.items():
        (folder / f"{stage}.json").write_text(json.dumps({"seconds": value}))


def test_the_time_of_a_sweep_is_that_of_the_stages_that_it_runs(plan: Plan) -> None:
    task = prepare(plan.home, ["trainer.num_train_epochs=2,4", "seed=1,2"], True)
    assert seconds_of_all(plan, task.points, [], task.base, 1) is None
    timed(plan.home, train=100, evaluate=10, sample=5, report=3, publish=2)
    epochs = task.base["trainer"]["num_train_epochs"]
    once = sum(100 * n / epochs + 10 + 5 + 3 + 2 + 6 for n in (2, 2, 4, 4))
    found = seconds_of_all(plan, task.points, [], task.base, 1)
    assert found == (pytest.approx(once), "reports/timings")
    halved = seconds_of_all(plan, task.points, [], task.base, 2)
    assert halved == (pytest.approx(once / 2), "reports/timings")
    before = [state(1.0, "trainer.num_train_epochs=2", f"seed={i}") for i in (3, 4)]
    for one, seconds in zip(before, (60.0, 120.0), strict=True):
        one.seconds = seconds
    assert seconds_of_all(plan, task.points, before, task.base, 1) == (360.0, "earlier trials")
    other = [state(1.0, "lora.r=8")]
    assert seconds_of_all(plan, task.points, other, task.base, 1) == found
    assert in_words(4, 0, found, 2).startswith("4 trials; 4 to run, 2 at once, about ")
    assert in_words(1, 0, (7300.0, "x"), 1) == "1 trial; 1 to run, about 2.0 hours (x)"


def test_a_value_that_would_reach_no_point_is_refused(plan: Plan) -> None:
    lines = "# @package _global_\ndefaults: [_base@sweep, _self_]\nsweep: {preset: mine}\n"
    mine = plan.home / "conf/own/sweep/mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(lines + "trainer: {num_train_epochs: 0.5}\n")
    with pytest.raises(
        CapasError, match=r"conf/own/sweep/mine.yaml sets trainer.num_train_epochs, which would"
    ):
        prepare(plan.home, ["sweep=mine", "lora.r=4,8"], True)
    mine.write_text(lines + "hydra: {sweeper: {params: {trainer.num_train_epochs: 0.5}}}\n")
    assert prepare(plan.home, ["sweep=mine", "lora.r=4,8"], True).expected == 2


def test_a_point_whose_process_always_dies_is_given_up_and_the_others_run(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*_: object) -> tuple[str, int]:
        """As joblib: where a worker dies, nothing comes after it."""
        known = {state.identity: state.status for state in read_states(plan.points)}
        for name in ("first", "deadly", "last"):
            if known.get(name) != FAILED:
                status = RUNNING if name == "deadly" else DONE
                State(name, name, []).write(plan.points, status=status)
            if name == "deadly" and known.get(name) != FAILED:
                return "the worker is gone", 1
        return "a point failed", 1

    monkeypatch.setattr(driver, "_launch", launched)
    driver.launch(plan, Task({}, {}, [], expected=3, at_once=3), [], multirun=True)
    states = {state.name: state for state in read_states(plan.points)}
    assert {n: s.status for n, s in states.items()} == {
        "first": DONE,
        "deadly": FAILED,
        "last": DONE,
    }
    assert "its process was killed" in states["deadly"].reason
    assert "the worker is gone" in states["deadly"].reason


@pytest.mark.parametrize("option", ["grid", "halving", "optuna", "learning_rate", "templates"])
def test_every_ready_sweep_composes(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPAS_SWEEP", "/nowhere")
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        words = [f"sweep={option}", "sweep.direction=maximize"]
        config = compose("sweep", overrides=words, return_hydra_config=True)
        assert config.sweep.preset == option
        own = {"preset", "keep", "language", "cross_templates", "rungs", "reduction_factor"}
        assert set(config.sweep) == {*SETTINGS, *own, "share_imports"}
        if option == "optuna":
            assert config.hydra.sweeper.direction == "maximize"


def test_slurm_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPAS_SWEEP", "/nowhere")
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        words = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
        launcher = compose("sweep", overrides=words, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node) == ("gpu", 1)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    late, early = State("b", "late", [], started=2.0), State("a", "early", ["r=1"], started=1.0)
    for one in (late, early):
        one.write(tmp_path, status=DONE, metrics={"x": None})
    assert [found.name for found in read_states(tmp_path)] == ["early", "late"]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json", ".json"]


def test_a_lock_names_its_holder_and_ends_with_the_block(tmp_path: Path) -> None:
    file = tmp_path / "deep/lock"
    with exclusive(file) as lock:
        lock.write("me")
        lock.flush()
        with pytest.raises(BusyError) as busy, exclusive(file, seconds=0.2):
            pass
        assert busy.value.text == "me"
    with exclusive(file, seconds=0):
        pass


def test_a_workspace_keeps_checkpoints_of_one_with_another_name(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("clone", "share_cache"):
        monkeypatch.setattr(f"capas.sweep.workspace.{name}", lambda *_: None)
    work, earlier = plan.work("r=8-abc"), plan.work("learning_rate=0.1-abc")
    for folder in (earlier, other := plan.work("r=8-xyz")):
        (folder / CHECKPOINTS / "train-1/checkpoint-10").mkdir(parents=True)
    lay_out(plan, work, {})
    assert (work / CHECKPOINTS / "train-1/checkpoint-10").exists()
    assert other.exists() and not earlier.exists()


def test_mlflow_is_told_the_objective_and_its_direction() -> None:
    rows = ranked(state(1.0, "r=1"), state(2.0, "r=2"))
    lessons: dict[str, list[str]] = {}
    result = driver.summary(rows, SETTINGS, False, lessons, notes=["r=1 is the smallest."])
    assert result["tags"]["sweep.objective"] == "train.loss"
    assert result["tags"]["sweep.direction"] == "minimize"
    assert result["tags"]["mlflow.note.content"].endswith("r=1 is the smallest.")


def test_lines_are_followed_and_a_failure_shows_the_last(tmp_path: Path) -> None:
    code = "import sys; [print('line', i) for i in range(99)]; sys.stdout.write('a\\rb\\n'); sys.exit(3)"
    found: list[str] = []
    with pytest.raises(CapasError) as error:
        found += follow(
            [sys.executable, "-c", code], tmp_path, environment(), tmp_path / "log", int
        )
    assert found == [*(f"line {i}" for i in range(99)), "a", "b"]
    text = str(error.value)
    assert "line 98\na\nb\nlog: " in text and "line 50" not in text


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


CHILD = """
import os, signal, sys, time
from pathlib import Path
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
Path(sys.argv[1]).write_text(str(os.getpid()))
try:
    time.sleep(600)
except KeyboardInterrupt:
    Path(sys.argv[1] + ".stopped").touch()
"""


@pytest.mark.parametrize("kind", ["obedient", pytest.param("stubborn", marks=pytest.mark.slow)])
def test_a_command_ends_with_who_started_it(tmp_path: Path, kind: str) -> None:
    pid = tmp_path / "pid"
    command = [sys.executable, "-c", CHILD, str(pid), kind]
    starter = (
        "import json, subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-m', 'capas.core.guard', *json.loads(sys.argv[1])], "
        "stdin=subprocess.PIPE); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", starter, json.dumps(command)], env=environment()
    )
    wait(pid.exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    child = int(pid.read_text())
    wait(lambda: not psutil.pid_exists(child), seconds=25)
    assert not psutil.pid_exists(child)
    assert (tmp_path / "pid.stopped").exists() == (kind == "obedient")


def draw(patch: pytest.MonkeyPatch, curves: dict[str, list[float]]) -> None:
    """The logged training losses, by learning rate."""
    patch.setattr(
        "capas.sweep.lesson.history",
        lambda name, plan: [{"loss": loss} for loss in curves[name.partition("=")[2]]],
    )


def test_a_learning_rate_is_too_low_right_or_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = {"0.1": [6.0, 9.0, 8.0], "0.01": [6.0, 1.0, 0.1], "0.001": [6.0, 5.0, 3.0]}
    draw(monkeypatch, curves)
    losses = {"0.1": 8.0, "0.01": 0.1, "0.001": 3.0}
    rows = ranked(*(state(loss, f"trainer.learning_rate={rate}") for rate, loss in losses.items()))
    plan: Any = None  # the curves are replaced
    low, right, high = lesson(rows, SETTINGS, plan)["en"]
    assert low.startswith("0.001 is too low: its steps are so small that it learns slowly.")
    assert low.endswith("went from 6.00 to 3.00, and there the training ended.")
    assert right.startswith(
        "0.01 is right, of those tried. train.loss 0.100; the training loss fell"
    )
    assert "0.1 is too high" in high and "6.00 at first, 9.00 at its highest and 8.00" in high
    assert "demasiado alta" in lesson(rows, SETTINGS, plan)["es"][2]
    for row in rows:
        row.overrides.append("trainer.max_steps=50")  # fixed: the same in all rows
    assert len(lesson(rows, SETTINGS, plan)["en"]) == 3
    assert lesson(ranked(state(1.0, "r=1"), state(2.0, "r=2")), SETTINGS, plan)["en"] == []
    assert lesson(rows[:1], SETTINGS, plan)["en"] == []


@pytest.mark.parametrize(
    ("value", "curve", "words"),
    [
        (0.205, [6.0, 0.2], "0.1 is within 10% of it, 0.205: one trial each cannot separate them."),
        (0.3, [6.0, 0.1], "0.1 ends worse: train.loss 0.300."),
        (0.3, [], "0.1 ends worse: train.loss 0.300."),
        (7.0, [6.0, 6.1], "0.1 is too high: its steps are so large that they destroy what was learned."),
    ],
)  # fmt: skip
def test_no_more_is_said_of_a_learning_rate_than_its_curve_shows(
    monkeypatch: pytest.MonkeyPatch, value: float, curve: list[float], words: str
) -> None:
    draw(monkeypatch, {"0.1": curve, "0.01": [6.0, 0.2]})
    losses = {"0.1": value, "0.01": 0.2}
    rows = ranked(*(state(loss, f"trainer.learning_rate={rate}") for rate, loss in losses.items()))
    plan: Any = None  # the curves are replaced
    best, other = lesson(rows, SETTINGS, plan)["en"]
    assert other.startswith(words)
    assert best.startswith("0.01 has the best" if "separate" in words else "0.01 is right")
