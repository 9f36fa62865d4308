"""conf/, params.yaml and conf/overrides.yaml agree, whichever way a value came in."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from composing import Composing
from composing import composed as composed  # the fixture
from hub import Hub, go_offline, use
from workspace import REPOSITORY, Workspace, stages_run

from capas.config.composition import NOTHING_OVERRIDDEN
from capas.config.environment import environment
from capas.config.requirements import num_gpus
from capas.hub.sources import folder_revision
from stages import compose_params


@pytest.fixture
def workspace(
    composed: Workspace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Composing:
    go_offline(monkeypatch)
    caplog.set_level(logging.INFO, "capas")
    made = Composing(composed.root, caplog)
    made.run("git", "checkout", "-q", ".")
    made.compose("--force")
    return made


def test_an_edit_of_conf_reaches_params(workspace: Composing) -> None:
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 8")
    assert "lora.r: 16 -> 8" in workspace.compose("--check")
    assert stages_run(workspace.repro("compose")) == ["compose"]
    assert "  r: 8\n" in workspace.read("params.yaml")


@pytest.fixture
def own_csv(workspace: Composing) -> Iterator[Path]:
    """A file of free answers, and a configuration that names it."""
    workspace.edit("conf/config.yaml", "dataset: embedded", "dataset: own_csv")
    file = workspace.root / "data/own/mine.csv"
    rows = (f"Question {i}?,Please wait {i} days and then ask once more." for i in range(9))
    file.write_text("question,answer\n" + "\n".join(rows))
    yield file
    file.unlink()


def test_metrics_follow_the_answers_of_own_data(workspace: Composing, own_csv: Path) -> None:
    log = workspace.compose()
    assert "looked at the answers (free text, 9 words in the median): chrf, rougeL" in log
    assert "metrics:\n  - chrf\n  - rougeL\n" in workspace.read("params.yaml")
    assert "was moved" not in workspace.compose() and "->" not in workspace.compose("--check")
    printed = workspace.run("python", "stages/compose_params.py", "--print")
    assert json.loads(printed.splitlines()[-1])["evaluation"]["metrics"] == ["chrf", "rougeL"]
    own_csv.write_text("question,answer\n" + "a,yes\nb,no\n" * 3)
    assert "2 labels" in workspace.compose()
    assert "metrics:\n  - exact_match\n" in workspace.read("params.yaml")
    assert workspace.read("conf/overrides.yaml") == NOTHING_OVERRIDDEN
    own_csv.write_text(
        "question,answer\n" + "".join(f"{i},{['sí', 'no'][i % 2]}\n" for i in range(30))
    )
    assert '2 labels ("no", "sí"), the most frequent in 50% of' in workspace.compose()
    assert "metrics:\n  - label_accuracy\n" in workspace.read("params.yaml")


def test_answers_that_are_no_labels_are_refused_before_any_stage(
    workspace: Composing, own_csv: Path
) -> None:
    workspace.edit("conf/dataset/own_csv.yaml", "evaluation: auto", "evaluation: labels")
    assert "9 of 9 distinct answers occur only once ('Please wait 0" in workspace.refusal()
    own_csv.write_text("question,answer\na,yes\nb,yes\n")
    assert "the answers of the dataset: a single label ('yes')" in workspace.refusal()
    rows = "".join(f"Question {i}?,Answer {i}\n" for i in range(201))
    own_csv.write_text(f"question,answer\n{rows}")
    assert "201 distinct texts ('Answer 0', 'Answer 1', 'Answer 10'" in workspace.refusal()
    own_csv.write_text("question,answer\n" + "a,yes\nb,no\nc,maybe\n" * 3)
    workspace.edit("conf/evaluation/_base.yaml", "labels: null", "labels: ['yes', 'no']")
    said = "3 records: the answer 'maybe' is not among evaluation.labels ('yes', 'no')"
    assert said in workspace.refusal()
    workspace.edit("conf/evaluation/_base.yaml", "labels: ['yes', 'no']", "labels: null")
    workspace.compose()


def test_the_embedded_records_have_no_labels(workspace: Composing) -> None:
    labels = "[_base, override /evaluation@_global_.evaluation: labels]"
    workspace.edit("conf/dataset/embedded.yaml", "[_base]", labels)
    assert "the answers of the embedded records are calls in JSON" in workspace.refusal()


def test_an_experiment_on_own_data_does_not_fix_its_metrics(
    workspace: Composing, own_csv: Path
) -> None:
    workspace.compose()
    workspace.experiment("lora.r=4")
    assert "metrics:\n  - chrf\n  - rougeL\n" in workspace.read("params.yaml")
    assert workspace.read("conf/overrides.yaml").endswith("\nlora:\n  r: 4\n")


def test_auto_metrics_need_files_of_ones_own(workspace: Composing) -> None:
    workspace.edit("conf/config.yaml", "dataset: embedded", "dataset: gsm8k")
    refused = workspace.refusal("--print", "evaluation=auto")
    assert "dataset.path is openai/gsm8k. Choose one of conf/evaluation/" in refused
    workspace.edit("conf/config.yaml", "dataset: gsm8k", "dataset: own_csv")
    assert "data/own/mine.csv" in workspace.refusal()


def test_composing_again_changes_no_byte(workspace: Composing) -> None:
    before = {name: workspace.read(name) for name in ("params.yaml", "environment.yaml")}
    workspace.edit("conf/config.yaml", "# The whole pipeline", "# All of the pipeline")
    workspace.compose()
    assert {name: workspace.read(name) for name in before} == before


def test_a_hand_edit_of_params_becomes_an_override(workspace: Composing) -> None:
    workspace.edit("params.yaml", "learning_rate: 0.00", "learning_rate: 0.01")
    log = workspace.repro("compose")
    assert "moved to conf/overrides.yaml" in log
    assert "conf/overrides.yaml sets trainer.learning_rate=0.01" in log
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 8")  # a later edit of another key
    workspace.compose()
    assert "learning_rate: 0.01" in workspace.read("params.yaml")
    assert "  r: 8\n" in workspace.read("params.yaml")


def test_an_adopted_key_is_named_when_its_file_is_edited(workspace: Composing) -> None:
    workspace.edit("params.yaml", "  r: 16", "  r: 4")
    workspace.compose()
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 8")
    assert "conf/overrides.yaml sets lora.r=4" in workspace.compose()
    workspace.compose("--reset")
    assert "  r: 8\n" in workspace.read("params.yaml")


def test_a_group_edited_by_hand_is_read_back_as_a_choice(workspace: Composing) -> None:
    workspace.edit("conf/config.yaml", "quantization: nf4", "quantization: int8")
    workspace.compose()
    int8 = workspace.read("params.yaml").split("\n", 1)[1]
    workspace.run("git", "checkout", "-q", ".")
    stamp = workspace.read("params.yaml").split("\n", 1)[0]
    (workspace.root / "params.yaml").write_text(f"{stamp}\n{int8}")
    workspace.compose()
    assert "override /quantization: int8" in workspace.read("conf/overrides.yaml")
    assert "load_in" not in workspace.read("conf/overrides.yaml")


def test_edits_on_both_sides_are_refused_and_nothing_is_lost(workspace: Composing) -> None:
    workspace.edit("params.yaml", "  r: 16", "  r: 4")
    workspace.edit("conf/dataset/embedded.yaml", "max_length: 256", "max_length: 128")
    log = workspace.refusal()
    assert "they differ in: " in log
    assert "lora.r" in log
    assert "dataset.max_length" in log
    assert "  r: 4\n" in workspace.read("params.yaml")
    workspace.compose("--keep")
    assert "max_length: 256" in workspace.read("params.yaml")


def test_a_wrong_value_stops_before_it_reaches_conf(workspace: Composing) -> None:
    workspace.edit("params.yaml", "  r: 16", "  r: 0")
    log = workspace.refusal()
    assert "lora.r=0: input should be greater than 0" in log
    assert workspace.read("conf/overrides.yaml") == "# Nothing overridden.\n"


def test_exp_run_keeps_its_value_and_apply_adopts_it(workspace: Composing) -> None:
    workspace.run(
        "dvc", "exp", "run", "-n", "faster", "-S", "trainer.learning_rate=1e-3", "compose"
    )
    assert "learning_rate: 0.001\n" in workspace.read("params.yaml")
    workspace.run("git", "checkout", "-q", ".")
    workspace.run("dvc", "exp", "apply", "faster")
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 8")
    workspace.compose()
    assert "learning_rate: 0.001\n" in workspace.read("params.yaml")


def test_exp_run_takes_a_group_choice(workspace: Composing) -> None:
    workspace.run("dvc", "exp", "run", "-n", "quick", "-S", "experiment=quick", "compose")
    assert "max_steps: 20" in workspace.read("params.yaml")
    assert "override /experiment: quick" in workspace.read("conf/overrides.yaml")


def test_a_model_that_was_tried_brings_its_template_and_pins_none(workspace: Composing) -> None:
    model, commit = "model=gemma_2_2b_it", f"model.revision={'0' * 40}"
    workspace.experiment(model, commit)
    assert "preset: gemma\n" in workspace.read("params.yaml")
    assert "override /chat_template" not in workspace.read("conf/overrides.yaml")
    other = "chat_template=chatml"
    workspace.experiment(model, commit, other)
    assert "override /chat_template: chatml" in workspace.read("conf/overrides.yaml")


@pytest.mark.parametrize(
    "edited", ["conf/config.yaml", "capas/report/style.css", "stages/fetch_dataset.py"]
)
def test_a_file_that_is_edited_meanwhile_is_noticed(
    workspace: Composing, monkeypatch: pytest.MonkeyPatch, edited: str
) -> None:
    file, before = workspace.root / edited, workspace.read("params.yaml")
    content = file.read_bytes()

    def edit() -> str:
        file.write_bytes(content + b"\n")
        return environment()

    monkeypatch.setattr(compose_params, "environment", edit)
    try:
        assert "was edited while it was composed" in workspace.refusal()
    finally:
        file.write_bytes(content)
    assert workspace.read("params.yaml") == before


def test_exp_run_refuses_to_drop_a_hand_edit(workspace: Composing) -> None:
    workspace.edit("params.yaml", "  r: 16", "  r: 4")
    log = workspace.run("dvc", "exp", "run", "-S", "seed=3", "compose", check=False)
    assert "params.yaml was edited by hand" in log
    assert "  r: 4\n" in workspace.read("params.yaml")


def test_a_template_outside_conf_is_refused(workspace: Composing, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    workspace.edit(
        "conf/chat_template/_base.yaml",
        "path: conf/chat_template/${.preset}.jinja",
        f"path: {tmp_path}/mine.jinja",
    )
    assert "move the file into conf/" in workspace.refusal()


def test_prompts_of_ones_own_come_from_a_file(workspace: Composing) -> None:
    (workspace.root / "conf/generation/mine.txt").write_text("Call Ana.\n\nPon música.\n")
    workspace.edit(
        "conf/generation/_base.yaml", "prompts: null", "prompts: conf/generation/mine.txt"
    )
    workspace.compose()
    assert '"Call Ana.",\n    "Pon música."' in workspace.read("data/composed/prompts.json")
    (workspace.root / "conf/generation/mine.txt").unlink()
    assert "no such file" in workspace.refusal()


def test_a_function_of_ones_own_is_copied_and_an_edit_of_it_is_seen(workspace: Composing) -> None:
    own, composed = workspace.root / "data/own/scores.py", "data/composed/metrics.json"
    chosen = "metrics: [exact_match, data/own/scores.py:politeness]"
    workspace.edit("conf/evaluation/_base.yaml", "metrics: [exact_match, valid_json]", chosen)
    assert "there is no data/own/scores.py" in workspace.refusal()
    own.write_text("def politeness(completion, reference, record):\n    return 1\n")
    workspace.repro("compose")
    assert json.loads(workspace.read(composed))["sources"] == {
        "data/own/scores.py": own.read_text()
    }
    before = workspace.outputs()[composed]
    own.write_text(own.read_text().replace("return 1", "return 0"))
    assert stages_run(workspace.repro("compose")) == ["compose"]
    assert workspace.outputs()[composed] != before
    own.write_text("def politeness(\n")
    assert "data/own/scores.py is not valid Python" in workspace.refusal()
    own.unlink()


def test_a_function_that_chooses_the_checkpoint_is_copied_for_the_training_alone(
    workspace: Composing,
) -> None:
    own, files = workspace.root / "data/own/scores.py", ("checkpoint_metric", "metrics")
    chosen = "metric_for_best_model: data/own/scores.py:politeness"
    workspace.edit("conf/trainer/_base.yaml", "metric_for_best_model: loss", chosen)
    assert "trainer.metric_for_best_model: data/own/scores.py" in workspace.refusal()
    own.write_text("def politeness(completion, reference, record):\n    return 1\n")
    workspace.compose()
    copies = [json.loads(workspace.read(f"data/composed/{name}.json")) for name in files]
    assert [copy["sources"] for copy in copies] == [{"data/own/scores.py": own.read_text()}, {}]
    assert copies[0].keys() == {"sources", "code", "packages"} and copies[1].keys() == {"sources"}
    own.unlink()


def test_a_dataset_that_was_tried_brings_its_evaluation_and_pins_none(workspace: Composing) -> None:
    dataset, commit = "dataset=gsm8k", f"dataset.revision={'0' * 40}"
    workspace.experiment(dataset, commit)
    assert "preset: final_number\n" in workspace.read("params.yaml")
    assert "override /evaluation" not in workspace.read("conf/overrides.yaml")
    workspace.experiment(dataset, commit, "evaluation=json")
    assert "override /evaluation: json" in workspace.read("conf/overrides.yaml")


def test_a_git_conflict_stops_dvc_itself(workspace: Composing) -> None:
    conflict = "<<<<<<< HEAD\nseed: 0\n=======\nseed: 1\n>>>>>>> other\n"
    workspace.edit("params.yaml", "seed: 0\n", conflict)
    assert "params.yaml" in workspace.repro(check=False)
    assert conflict in workspace.read("params.yaml")


def set_by_hand(workspace: Composing, old: str, new: str) -> tuple[str, str]:
    """An edit of params.yaml, composed; what then stands in params.yaml and in conf/overrides.yaml."""
    workspace.edit("params.yaml", old, new)
    workspace.compose()
    return workspace.read("params.yaml"), workspace.read("conf/overrides.yaml")


def test_a_value_that_others_are_derived_from_can_be_set_alone(workspace: Composing) -> None:
    params, overrides = set_by_hand(workspace, "\nseed: 0\n", "\nseed: 1\n")
    assert "  seed: 0\n  data_seed: 0\n" in params
    assert "  seed: 0\n  data_seed: 0\n" in overrides


def test_a_mapping_in_the_place_of_an_empty_one(workspace: Composing) -> None:
    old = "lr_scheduler_type: linear\n  lr_scheduler_kwargs: {}"
    new = "lr_scheduler_type: cosine\n  lr_scheduler_kwargs: {num_cycles: 2}"
    assert "num_cycles: 2" in set_by_hand(workspace, old, new)[0]


def test_a_text_that_looks_like_an_interpolation_stays_a_text(workspace: Composing) -> None:
    params, overrides = set_by_hand(workspace, "prompts: null", "prompts: ['It costs ${5}.']")
    assert "It costs ${5}." in params
    assert "It costs \\${5}." in overrides
    workspace.compose()
    assert '"It costs ${5}."' in workspace.read("data/composed/prompts.json")


def test_a_file_that_is_not_there_stops_before_it_reaches_conf(workspace: Composing) -> None:
    workspace.edit("params.yaml", "wrong_chat_template: llama3", "wrong_chat_template: lama3")
    log = workspace.refusal()
    assert "generation.wrong_chat_template='lama3': there is no conf/chat_template/lama3" in log
    assert workspace.read("conf/overrides.yaml") == "# Nothing overridden.\n"


def test_experiments_in_the_workspace_build_on_one_another(workspace: Composing) -> None:
    workspace.experiment("trainer.learning_rate=1e-3")
    log = workspace.run("dvc", "exp", "run", "-S", "lora.r=8", "compose")
    assert "conf/overrides.yaml sets trainer.learning_rate=0.001" in log
    workspace.compose("--reset")
    assert "learning_rate: 0.004\n" in workspace.read("params.yaml")


def test_an_experiment_that_is_refused_leaves_the_workspace_alone(workspace: Composing) -> None:
    before = workspace.read("params.yaml")
    log = workspace.run("dvc", "exp", "run", "-S", "lora.r=-3", "compose", check=False)
    assert "lora.r=-3: input should be greater than 0" in log
    assert workspace.read("params.yaml") == before
    workspace.compose()
    assert workspace.read("params.yaml") == before


def test_an_experiment_that_was_refused_leaves_no_riddle(workspace: Composing) -> None:
    """A file that is not there is missed by the stage alone, once DVC has written params.yaml."""
    missing = "generation.prompts=conf/generation/none.txt"
    before = workspace.read("params.yaml")
    log = workspace.run("dvc", "exp", "run", "-S", missing, "compose", check=False)
    assert "no such file" in log
    assert "capas: the workspace is as it was" in log
    assert workspace.read("params.yaml") == before
    workspace.compose()


def test_what_an_unfinished_experiment_left_without_a_record_is_no_riddle(
    workspace: Composing,
) -> None:
    stamp, values = workspace.read("params.yaml").split("\n", 1)
    (workspace.root / "params.yaml").write_text(values.replace("  r: 16", "  r: 4"))
    assert "left by an unfinished `dvc exp run`" in workspace.refusal()
    workspace.compose("--force")
    assert workspace.read("params.yaml") == f"{stamp}\n{values}"


def test_a_check_tells_what_would_become_of_a_hand_edit(
    workspace: Composing, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.edit("params.yaml", "  r: 16", "  r: 4")
    assert "lora.r=4 is not from conf/" in workspace.compose("--check")
    assert workspace.refusal("--check", "--reset") == "2"
    assert "not allowed with" in capsys.readouterr().err


def test_a_broken_params_yaml_is_a_message(workspace: Composing) -> None:
    workspace.edit("params.yaml", "seed: 0\n", "<<<<<<< HEAD\nseed: 0\n")
    log = workspace.run("python", "stages/compose_params.py", check=False)
    assert "compose: params.yaml is not valid YAML" in log
    assert "Traceback" not in log


@pytest.fixture
def online(
    workspace: Composing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Composing, Hub, dict[str, str]]]:
    """The hub on loopback, for this process, and what a command needs to find it."""
    with Hub() as hub:
        use(hub, tmp_path / "home", monkeypatch)
        home = str(tmp_path / "home")
        yield workspace, hub, {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}


def pinned(workspace: Composing) -> str:
    values = yaml.safe_load(workspace.read("params.yaml"))
    return str(values["model"]["revision"])


def test_a_branch_on_the_hub_is_pinned_until_it_is_updated(
    online: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, hub, env = online
    first = hub.commit("models/org/x", {"config.json": b"{}"})
    workspace.edit("conf/model/embedded.yaml", ": data/embedded", ": org/x")
    workspace.edit("conf/model/embedded.yaml", "revision: null", "revision: main")
    checked = workspace.compose("--check")
    assert f"model.revision: None -> {first}" in checked
    assert "org/x" not in workspace.read("conf/revisions.yaml") + workspace.read("params.yaml")
    assert f"pinned org/x@main to {first} in conf/revisions.yaml" in workspace.repro(
        "compose", **env
    )
    second = hub.commit("models/org/x", {"config.json": b"{ }"})
    assert "didn't change, skipping" in workspace.repro("compose", **env)
    workspace.edit("conf/lora/_base.yaml", "r: 16", "r: 8")
    with monkeypatch.context() as patch:
        go_offline(patch)
        workspace.compose()
    assert pinned(workspace) == first
    assert f"org/x@main: {first} -> {second}" in workspace.compose("--update-revisions")
    assert pinned(workspace) == second
    assert workspace.read("conf/overrides.yaml") == "# Nothing overridden.\n"
    assert hub.url not in workspace.read("params.yaml") + workspace.read("conf/revisions.yaml")


def test_without_a_network_nothing_is_pinned_and_nothing_written(workspace: Composing) -> None:
    workspace.edit("conf/model/embedded.yaml", ": data/embedded", ": org/x")
    before = workspace.read("params.yaml")
    log = workspace.refusal()
    assert "model.revision=null is not pinned yet. Set the revision to a commit" in log
    assert (workspace.read("params.yaml"), "org/x" in workspace.read("conf/revisions.yaml")) == (
        before,
        False,
    )


def test_a_pin_is_no_override(online: Any) -> None:
    """`dvc exp run` writes the branch into params.yaml, capas the commit; a hand edit is of another key."""
    workspace, hub, env = online
    commit = hub.commit("models/org/x", {"config.json": b"{}"})
    name = "model.model_name_or_path=org/x"
    workspace.run("dvc", "exp", "run", "-n", "hub", "-S", name, "compose", **env)
    assert pinned(workspace) == commit
    assert yaml.safe_load(workspace.read("conf/overrides.yaml")) == {
        "model": {"model_name_or_path": "org/x"}
    }
    workspace.edit("params.yaml", "  r: 16", "  r: 4")
    workspace.compose()
    assert (pinned(workspace), "revision" in workspace.read("conf/overrides.yaml")) == (
        commit,
        False,
    )
    workspace.run("git", "checkout", "-q", ".")
    workspace.run("dvc", "exp", "apply", "hub")
    assert commit in workspace.read("conf/revisions.yaml")
    assert "didn't change, skipping" in workspace.repro("compose")


def test_dvc_exp_run_refuses_what_is_wrong_at_once_and_leaves_the_workspace_alone(
    workspace: Composing,
) -> None:
    before = workspace.run("git", "status", "--porcelain"), workspace.read("params.yaml")
    given = ("lora.rank=8", "trainer.lr=1e-3", "trainer.max_steps=0", "model.revision=12e4567")
    log = workspace.run("dvc", "exp", "run", *(f"-S{o}" for o in given), "compose", check=False)
    for sentence in (
        "lora.rank: no such key; did you mean lora.r?",
        "trainer.lr: no such key; did you mean trainer.learning_rate?",
        "trainer.max_steps=0: expected -1 (epochs decide) or at least 1",
        "model.revision=12e4567: expected a text, and 12e4567 is read as a number",
    ):
        assert sentence in log
    assert "4 problems in" in log and "Traceback" not in log and "unexpected error" not in log
    assert (workspace.run("git", "status", "--porcelain"), workspace.read("params.yaml")) == before
    kwargs = "trainer.lr_scheduler_kwargs={num_cycles: 2}"
    schedule = "trainer.lr_scheduler_type=cosine_with_restarts"
    workspace.run("dvc", "exp", "run", "-S", schedule, "-S", kwargs, "compose")
    values = yaml.safe_load(workspace.read("params.yaml"))
    assert values["trainer"]["lr_scheduler_kwargs"] == {"num_cycles": 2}


def state_of(workspace: Workspace) -> tuple[str, ...]:
    """What a command that was refused must leave as it was."""
    refs = workspace.run("git", "for-each-ref", "--format=%(refname)", "refs")
    store = str((workspace.root / "mlflow.db").exists())
    files = (workspace.read("params.yaml"), workspace.read("conf/overrides.yaml"))
    return (workspace.run("git", "status", "--porcelain"), refs, store, *files)


def test_the_queue_takes_no_value_before_all_combinations_are_valid(workspace: Composing) -> None:
    shutil.copyfile(REPOSITORY / "dvc.yaml", workspace.root / "dvc.yaml")
    before = state_of(workspace)
    queue = ("dvc", "exp", "run", "--queue")
    log = workspace.run(*queue, "-S", "lora.r=8,-3", "-S", "lora=all_liner", check=False)
    assert "2 problems in the configuration; nothing was queued" in log
    assert "lora=all_liner: no such option; did you mean all_linear?" in log
    assert "lora.r=-3: input should be greater than 0" in log and "Queued" not in log
    assert state_of(workspace) == before
    log = workspace.run(*queue, "-S", "lora.r=8,16", "-S", "hardware=gpu")
    assert log.count("Queued experiment") == 2
    if num_gpus() == 0:
        assert "this machine lacks what was queued" in log and "no NVIDIA GPU" in log
    workspace.run("dvc", "queue", "remove", "--all")


def test_an_experiment_elsewhere_is_refused_as_well_and_leaves_nothing(
    workspace: Composing,
) -> None:
    before = state_of(workspace)
    log = workspace.run("dvc", "exp", "run", "--temp", "-S", "experiment=quik", check=False)
    assert "experiment=quik: no such option; did you mean quick?" in log
    assert "Available options" not in log and state_of(workspace) == before


def test_a_stage_by_hand_tells_what_is_wrong_once(workspace: Composing) -> None:
    shutil.copyfile(REPOSITORY / "dvc.yaml", workspace.root / "dvc.yaml")
    before = state_of(workspace)
    log = workspace.run(
        "python", "stages/train_lora.py", "lora.rank=8", "trainer=qlorra", check=False
    )
    assert log.splitlines() == [
        "compose: 2 problems in the configuration; no stage was run:",
        "  lora.rank: no such key; did you mean lora.r?",
        "  trainer=qlorra: no such option; did you mean qlora?",
    ]
    assert state_of(workspace) == before
    refused = workspace.refusal("--print", "lora=all_liner", "trainer.lr=1")
    assert "did you mean all_linear?" in refused and "did you mean trainer.learning" in refused


def test_a_revision_that_somebody_chose_is_an_override(online: Any) -> None:
    workspace, hub, _ = online
    hub.commit("models/org/x", {"config.json": b"{}"})
    tagged = hub.commit("models/org/x", {"config.json": b"{ }"}, branch="v2")
    workspace.edit("conf/model/embedded.yaml", ": data/embedded", ": org/x")
    workspace.compose()
    workspace.experiment("model.revision=v2")
    assert pinned(workspace) == tagged
    assert yaml.safe_load(workspace.read("conf/overrides.yaml")) == {"model": {"revision": "v2"}}


def test_a_folder_is_pinned_and_an_edit_in_it_taken_over(workspace: Composing) -> None:
    folder = workspace.root / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    workspace.edit("conf/model/embedded.yaml", ": data/embedded", ": mine")
    workspace.compose()
    first = pinned(workspace)
    (folder / "config.json").write_text("{ }")
    workspace.compose()
    assert pinned(workspace) == first
    workspace.compose("--update-revisions")
    assert pinned(workspace) == folder_revision(folder) != first
    shutil.rmtree(folder)
