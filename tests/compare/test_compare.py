"""`capas compare`: what it says of commits, experiments, the workspace and MLflow runs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparing import QUESTIONS, RIGHT, TRAIN, WRONG, Results, answered

from capas import __main__ as cli
from capas.evaluation.comparison import paired_difference

Compare = Callable[..., str]
WIDTH = 80


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """HEAD has 3 of 10 right; `wide` (lora.r=32) 9, `seed` (another seed) 3 others, `attention` 4."""
    results = Results.make(tmp_path_factory.mktemp("compare") / "results")
    results.record(answered(3), seconds=12.0)
    results.commit()
    for name, answers, overrides in (
        ("wide", answered(9), ["lora.r=32"]),
        ("seed", answered(3, first=1), ["seed=1"]),
        ("attention", answered(4), ["lora=attention"]),
    ):
        results.record(answers, overrides, loss=0.25)
        results.experiment(name)
        results.reset()
    return results


@pytest.fixture
def results(made: Results, tmp_path: Path) -> Results:
    """A copy to change."""
    return Results(Path(shutil.copytree(made.root, tmp_path / "results", symlinks=True)))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Compare:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "CAPAS_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", str(WIDTH))

    def run(results: Results, *words: str, code: int = 0) -> str:
        monkeypatch.chdir(results.root)
        assert cli.main(["compare", *words]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


def facts(compare: Compare, results: Results, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(compare(results, *words, "--json"))
    return found


def flat(said: str) -> str:
    """The words, however they are broken into lines."""
    return " ".join(said.split())


def test_two_results_side_by_side(made: Results, compare: Compare) -> None:
    """The whole page; the interval is that of capas.evaluation.comparison, checked below."""
    commit = made.run("git", "rev-parse", "--short=7", "HEAD").strip()
    wide = made.run("git", "for-each-ref", "--format=%(objectname:short=7)", "refs/exps/*/*/wide")
    assert compare(made, "HEAD", "wide").splitlines() == [
        f"A  HEAD  commit {commit}: test",
        f"B  wide  experiment {wide.strip()}",
        "",
        "B is better: exact match 30.0 % -> 90.0 %, +60.0 points, 95 % interval 20.0 to",
        "97.2 on 10 test records.",
        "",
        "                   A HEAD                 B wide",
        "lora.r             16                     32",
        "",
        "exact match        30.0 % (10.8 to 60.3)  90.0 % (59.6 to 98.2)",
        "loss               0.5                    0.25",
        "training, seconds  12                     –",
        "",
        "Loss of B: better, -0.25, 95 % interval -0.25 to -0.25.",
        "",
        "Note: The seconds of B are not known here: DVC restored the training, or it ran",
        "      on another machine",
        "",
        "Of 10 test records B alone is right on 6, A alone on 0; 4 score alike.",
        "",
        "Only B is right",
        "  asked   Set a timer for 4 minutes.",
        '  wanted  {"minutes": 4}',
        "  A                                       B",
        '  {"minutes": 0}                          {"minutes": 4}',
        "",
        "--why shows more of them, with similar training records",
    ]


def test_the_interval_is_paired(made: Results, compare: Compare) -> None:
    found = facts(compare, made, "HEAD", "wide")
    before, after = [1.0] * 3 + [0.0] * 7, [1.0] * 9 + [0.0]
    settings = {"resamples": 2000, "confidence_fraction": 0.95, "seed": 0}
    expected = paired_difference(before, after, [1.0] * 10, **settings)
    assert {k: found["difference"][k] for k in expected} == expected
    assert found["difference"]["verdict"] == "better"
    assert found["won"] == [f"test-{i:02}" for i in range(3, 9)]
    assert found["lost"] == []
    assert found["params"] == {"lora.r": ["16", "32"]}


def test_scores_of_labels_stand_beside_the_accuracy(compare: Compare, tmp_path: Path) -> None:
    results = Results.make(tmp_path / "labels")
    for num_right, f1, log_loss in ((3, 0.25, 1.5), (9, 0.75, 0.5)):
        results.record(
            answered(num_right),
            [f"lora.r={num_right}"],
            metrics=("label_accuracy",),
            scores=[float(i < num_right) for i in range(10)],
            summarized={"label_macro_f1": f1, "label_log_loss": log_loss},
        )
        results.commit()
    said = flat(compare(results, "HEAD~1", "HEAD"))
    assert "B is better: label accuracy 30.0 % -> 90.0 %" in said
    assert "label macro f1 25.0 % 75.0 %" in said and "label log loss 1.5 0.5" in said
    assert facts(compare, results, "HEAD~1", "HEAD")["difference"]["verdict"] == "better"


def test_a_choice_stands_for_what_follows_from_it(made: Results, compare: Compare) -> None:
    said = compare(made, "HEAD", "attention")
    assert "\nlora               all_linear             attention\n" in said
    assert "target_modules" not in said
    assert "(1 more value follows from these.)" in said
    found = facts(compare, made, "HEAD", "attention")
    assert found["choices"] == ["lora"]
    assert found["explained"] == ["lora.target_modules"]


def test_only_the_seed(made: Results, compare: Compare) -> None:
    found = facts(compare, made, "HEAD", "seed")
    assert found["params"] == {"seed": ["0", "1"]}
    assert sorted(found["explained"]) == ["trainer.data_seed", "trainer.seed"]
    assert found["verdict"] == (
        "No difference is shown: exact match 30.0 % -> 30.0 %, +0.0 points, 95 % interval -30.0 to 30.0 on "
        "10 test records contains zero. Only the seed differs: this is how much trainings differ by chance."
    )


def test_one_name_is_compared_with_the_workspace(made: Results, compare: Compare) -> None:
    found = facts(compare, made, "wide")
    assert (found["a"]["name"], found["b"]["name"]) == ("wide", "workspace")
    assert found["difference"]["verdict"] == "worse"


def test_the_same_result_twice(made: Results, compare: Compare) -> None:
    sha256 = facts(compare, made, "HEAD", "main")["a"]["adapter_sha256"]
    said = compare(made, "HEAD", "main")
    assert f"The same adapter (sha256 {sha256[:12]}…). Nothing differs." in said
    assert "The answers are the same, all 10 of them." in said


def test_several_are_a_row_each(made: Results, compare: Compare) -> None:
    lines = compare(made, "HEAD", "wide", "attention", "seed").splitlines()
    assert [line.split()[0] for line in lines[1:8:2]] == ["HEAD", "wide", "attention", "seed"]
    assert lines[3] == "wide            90.0 %  +60.0 (20.0 to 97.2)  0.25        –"
    assert lines[2] == "    lora=all_linear  lora.r=16  seed=0"
    assert lines[4] == "    lora.r=32"
    assert max(map(len, lines)) <= WIDTH


def test_a_few_keys_are_columns(made: Results, compare: Compare) -> None:
    lines = compare(made, "HEAD", "wide", "HEAD").splitlines()
    assert lines[0].split() == ["r", "exact", "match", "to", "the", "first", "loss", "seconds"]
    assert lines[2].split()[:4] == ["wide", "32", "90.0", "%"]


def test_without_names_the_workspace_and_the_experiments(
    results: Results, compare: Compare
) -> None:
    unchanged = compare(results)
    assert "The workspace has the result of the last commit, the baseline." in unchanged
    assert "exact match          30.0 % (10.8 to 60.3)\n  of its base model  0.0 %" in unchanged
    results.record(answered(6), ["lora.r=4"])
    said = compare(results)
    assert said.startswith("A  HEAD")
    assert "B  workspace  the files here\n" in said
    assert "lora.r             16                     4\n" in said
    rows = [line.split()[0] for line in said.splitlines()[-12:] if line and line[0].isalpha()]
    assert rows[:5] == ["HEAD", "workspace", "attention", "seed", "wide"]  # newest first
    results.experiment("narrow")
    again = compare(results, "--rows", "1")
    assert "B  workspace  the files here = experiment narrow\n" in again
    assert "\nnarrow *  " in again
    assert "3 older ones are not listed" in again


def test_the_first_result_is_the_baseline(compare: Compare, tmp_path: Path) -> None:
    results = Results.make(tmp_path / "results")
    assert "there is no result yet: run `dvc repro`" in compare(results, code=2)
    results.record(answered(5))
    said = compare(results)
    assert said.startswith("workspace  the files here\n")
    assert "This result is the first, the baseline: no commit here has one yet." in flat(said)
    assert "has no result: evaluate has not run" in compare(results, "HEAD", code=2)
    results.commit()
    results.record(answered(8), ["lora.r=8"])
    assert "exact match 50.0 % -> 80.0 %, +30.0 points" in flat(compare(results))


def test_other_test_records_are_not_compared(results: Results, compare: Compare) -> None:
    others = [question.replace("timer", "clock") for question in QUESTIONS]
    results.record(answered(9), ["dataset.path=csv"], questions=others, train=TRAIN[:1])
    said = compare(results, "HEAD", "workspace")
    assert (
        "\nNot comparable: the data sets (embedded, csv) differ, and so do their test\n"
        "records.\n" in said
    )
    assert re.search(r"^training records +2 +1$", said, re.MULTILINE)
    assert " interval" not in said
    found = facts(compare, results, "HEAD", "workspace")
    assert (found["test_records"], found["difference"]) == ("other", None)
    assert "other test records" in compare(results, "HEAD", "workspace", "wide")


def test_records_that_both_have_are_compared(results: Results, compare: Compare) -> None:
    """B has the last four records alone, of which it answers all; A none of them."""
    results.record(
        RIGHT[:4] + ["x"] * 2, questions=QUESTIONS[:6], references=RIGHT[:6], seconds=3.0
    )
    said = flat(compare(results))
    assert (
        "exact match 50.0 % -> 66.7 %, +16.7 points, 95 % interval 0.0 to 83.2 on the 6 test records that "
        "both have (A 10, B 6)" in said
    )


def test_answers_that_are_not_here(results: Results, compare: Compare) -> None:
    results.lose_cache()
    said = flat(compare(results, "HEAD", "wide"))
    assert "Exact match 30.0 % -> 90.0 %, +60.0 points." in said
    assert "the answers of A and B are not here" in said
    assert "`dvc exp pull REMOTE wide`" in said
    assert "`dvc fetch --all-commits evaluate`" in said
    assert "lora.r 16 32" in said
    why = flat(compare(results, "HEAD", "wide", "--why"))
    assert "The training records cannot be compared. A: data/raw/train.parquet is not in" in why


def test_a_file_of_the_workspace_counts_if_it_is_the_recorded_one(
    results: Results, compare: Compare
) -> None:
    md5 = results.outputs()["reports/predictions.parquet"]
    cached = results.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    file = results.root / "reports/predictions.parquet"
    cached.rename(file)
    assert facts(compare, results, "HEAD", "wide")["difference"]["mean"] == pytest.approx(0.6)
    file.write_bytes(file.read_bytes() + b" ")
    assert facts(compare, results, "HEAD", "wide")["difference"] is None


def test_a_damaged_file_is_named(results: Results, compare: Compare) -> None:
    md5 = results.outputs()["reports/predictions.parquet"]
    (results.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).write_bytes(b"PAR1")
    assert f"{md5[2:]} is no complete parquet file" in compare(results, "HEAD", "wide", code=2)


def test_why_shows_the_training_record_that_only_one_side_has(
    results: Results, compare: Compare
) -> None:
    """The planted records: B gained one near question 8 and lost one near question 2."""
    results.record(RIGHT[:1] + [WRONG, *RIGHT[2:3]] + [WRONG] * 4 + [RIGHT[7], WRONG, WRONG],
                   train=[*TRAIN, ("Just set a timer for 8 minutes.", "B's")])  # fmt: skip
    before = [*TRAIN, ("Just set a timer for 2 minutes.", "A's")]
    results.experiment("b")
    results.record(answered(3), train=before)
    results.experiment("a")
    said = compare(results, "a", "b", "--why")
    assert "Training records: 2 in both, 1 only in A, 1 only in B." in said
    won, lost = said.split("Only B is right: 1 of 1 won")[1].split("Only A is right: 1 of 1 lost")
    assert "test record test-07" in won
    assert won.index("record of B that A lacks: train-02") < won.index("record of A that B lacks")
    assert lost.index("record of A that B lacks: train-02") < lost.index("record of B that A lacks")
    assert "    asked   Just set a timer for 2 minutes.\n    answer  A's" in lost
    found = facts(compare, results, "a", "b", "--why")
    (near, _) = found["records"][0]["nearest"]
    assert (near["question"], near["only"]) == ("Just set a timer for 8 minutes.", "B")


def test_why_says_where_the_training_records_are_the_same(made: Results, compare: Compare) -> None:
    said = compare(made, "HEAD", "wide", "--why", "--records", "2")
    assert "Both were trained on the same records" in said
    assert "Only B is right: 2 of 6 won" in said
    assert "--why compares two results" in compare(made, "HEAD", "wide", "seed", "--why", code=2)


def test_an_unknown_name_is_answered_with_those_there_are(made: Results, compare: Compare) -> None:
    said = compare(made, "wider", code=2)
    assert "called 'wider'; did you mean wide?" in said
    assert "experiments: attention, seed, wide" in said
    assert "branches and tags: main" in said


def test_without_git_there_is_the_workspace_alone(compare: Compare, tmp_path: Path) -> None:
    results = Results.make(tmp_path / "results")
    results.record(answered(5))
    shutil.rmtree(results.root / ".git")
    assert compare(results).startswith("workspace  the files here\n")
    said = compare(results, "HEAD", code=2)
    assert "always there: workspace\n" in said
    assert "is no git repository with a commit" in said


def test_keys_of_another_version_of_conf_are_one_line(results: Results, compare: Compare) -> None:
    """But a mapping that was empty is a difference of values."""
    results.record(answered(4), ["trainer.lr_scheduler_kwargs={num_cycles: 2}"])
    for file in ("params.yaml", "dvc.lock"):
        text = results.read(file).replace("packing_length: null", "packing_length_new: null")
        for key in ("fused_lora", "use_dora", "use_rslora"):
            text = text.replace(f"{key}: false", f"{key}_new: false")
        (results.root / file).write_text(text)
    said = compare(results, "HEAD", "workspace")
    assert re.search(r"^trainer.lr_sch\S+cycles +– +2$", said, re.MULTILINE)
    only = "lora.use_dora, lora.use_rslora, trainer.fused_lora and 1 more"
    assert f"Parameters that A alone has: {only}" in flat(said)
    assert "Parameters that B alone has: " in said


def test_a_name_of_an_experiment_and_a_branch_is_refused(
    results: Results, compare: Compare
) -> None:
    results.run("git", "branch", "wide")
    said = compare(results, "wide", code=2)
    assert "names an experiment of DVC and a commit: say refs/exps/" in said
    reference = said.split("say ")[1].split()[0]
    assert facts(compare, results, reference)["a"]["kind"] == "experiment"


def test_an_experiment_of_two_commits_is_that_of_head(results: Results, compare: Compare) -> None:
    results.commit()
    results.record(answered(2), ["lora.r=2"])
    results.experiment("wide")
    found = facts(compare, results, "HEAD", "wide")
    assert found["params"] == {"lora.r": ["16", "2"]}
    results.reset()
    results.commit()
    assert "'wide' names 2 experiments" in compare(results, "wide", code=2)


def test_other_code_and_packages_are_named(results: Results, compare: Compare) -> None:
    results.record(answered(3), code="2")
    results.edit("dvc.lock", "torch: 2.13.0", "torch: 2.14.0")
    found = facts(compare, results, "HEAD", "workspace")
    assert found["code"] == ["stages/train_lora.py, or what it imports"]
    assert found["packages"] == {"torch": ["2.13.0", "2.14.0"]}
    said = compare(results, "HEAD", "workspace")
    assert (
        "The parameters are the same.\nCode that differs: stages/train_lora.py, or what it imports\n"
        in said
    )
    assert "Packages that differ: torch 2.13.0 -> 2.14.0\n" in said


def test_code_recorded_before_its_digests_is_not_compared(
    results: Results, compare: Compare
) -> None:
    lock = yaml.safe_load(results.read("dvc.lock"))
    del lock["stages"]["train"]["params"]["code.yaml"]
    lock["stages"]["train"]["deps"].append({"path": "capas/training/lora.py", "md5": "0"})
    (results.root / "dvc.lock").write_text(yaml.safe_dump(lock))
    found = facts(compare, results, "HEAD", "workspace")
    assert found["code"] == ["all, as the dvc.lock of B is older than code.yaml"]
    assert found["files"] == []


def test_scores_of_an_earlier_adapter(results: Results, compare: Compare) -> None:
    """train has run, evaluate has not run since."""
    lock = yaml.safe_load(results.read("dvc.lock"))
    lock["stages"]["train"]["outs"][0]["md5"] = "0.dir"
    (results.root / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert any("evaluate has not run since train" in n for n in notes(compare, results))


def test_metrics_of_another_run(results: Results, compare: Compare) -> None:
    results.edit("reports/metrics/tuned.json", '"exact_match": 0.3', '"exact_match": 0.7')
    assert any("says exact_match 0.7" in note for note in notes(compare, results))


def test_values_that_no_stage_has_run_with(results: Results, compare: Compare) -> None:
    results.edit("params.yaml", "r: 16", "r: 64")
    assert any("no stage has run with (lora.r)" in note for note in notes(compare, results))
    assert facts(compare, results, "HEAD", "workspace")["params"] == {}


def notes(compare: Compare, results: Results) -> list[str]:
    found: list[str] = facts(compare, results, "wide", "workspace")["notes"]
    return found


def test_losses_over_other_tokens_are_not_compared(results: Results, compare: Compare) -> None:
    results.record(answered(9), ["chat_template=llama3"], tokens=21, template="llama3")
    found = facts(compare, results, "HEAD", "workspace")
    assert found["difference"]["num_records"] == 10
    assert found["loss_difference"] is None
    assert any("losses cannot be compared" in note for note in found["notes"])


def test_results_without_a_metric_in_common(results: Results, compare: Compare) -> None:
    results.record(answered(9), ["lora.r=2"], metrics=["rouge1"], scores=[0.5] * 10, loss=0.25)
    found = facts(compare, results, "HEAD", "workspace")
    assert found["metric"] == "loss"
    assert found["verdict"].startswith("B is better: loss 0.5 -> 0.25, -0.25, 95 % interval")
    assert "Scored by different metrics (exact_match, rouge1)" in found["verdict"]


def test_scores_in_between_have_a_bootstrap_interval(results: Results, compare: Compare) -> None:
    graded = [i / 10 for i in range(10)]
    results.record(answered(3), ["lora.r=2"], metrics=["rouge1"], scores=graded)
    results.experiment("low")
    results.record(answered(5), metrics=["rouge1"], scores=[s + 0.05 for s in graded])
    found = facts(compare, results, "low", "workspace")
    assert found["difference"]["low"] == pytest.approx(0.05)
    expected = paired_difference(
        [0.0] * 10, graded, [1] * 10, resamples=2000, confidence_fraction=0.95, seed=0
    )
    assert found["a"]["score"]["low"] == expected["low"]
    assert "B scores higher on 10, A on 0" in compare(results, "low", "workspace")


@pytest.mark.parametrize("width", [40, 80])
def test_no_line_is_longer_than_the_terminal(
    results: Results, compare: Compare, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    answers = ["\x1b[31m" + "word " * 200] * 5 + ["日本語" * 60] * 5
    results.record(answers, ["lora.r=2", "generation.system=" + "x" * 300])
    results.experiment("a-name-of-a-sweep-" + "learning_rate=0.001-" * 4)
    monkeypatch.setenv("COLUMNS", str(width))
    from capas.compare.layout import width_of

    for words in ([], ["HEAD", "workspace", "--why"], ["HEAD", "wide", "workspace"]):
        said = compare(results, *words)
        assert max(map(width_of, said.splitlines())) <= width, said
        assert "\x1b" not in said
