"""conf/own: options of the user's beside those that capas ships, wherever conf/ is composed."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from composing import Composing
from composing import composed as composed  # the fixture
from hub import go_offline
from workspace import REPOSITORY, Workspace

from capas.config import options
from capas.config.composition import composer, word_given
from capas.config.schema import GROUPS
from capas.core.errors import CapasError

FILES = {
    "dataset/support.yaml": "defaults: [_base, override /evaluation@_global_.evaluation: polite]\n"
    "preset: support\npath: csv\ndata_files: data/own/support.csv\nshape: columns\n"
    "columns: {user: q, assistant: a}\nlicence: mine\n",
    "model/mine.yaml": "defaults: [embedded, _self_]\npreset: mine\nlicence: mit\n",
    "trainer/slow.yaml": "defaults: [qlora, _self_]\npreset: slow\nlearning_rate: 1.0e-5\n",
    "evaluation/polite.yaml": "defaults: [_base, _self_]\npreset: polite\nmetrics: [chrf]\n",
    "generation/short_ones.yaml": "defaults: [short, _self_]\npreset: short_ones\nnum_prompts: 1\n",
    "chat_template/plain.yaml": "defaults: [_base, _self_]\npreset: plain\n"
    "path: conf/own/chat_template/${.preset}.jinja\n",
    "chat_template/plain.jinja": "{% for m in messages %}{{ m['content'] }}{% endfor %}\n",
    "experiment/tried.yaml": "# @package _global_\ndefaults:\n  - override /trainer: slow\n"
    "  - override /chat_template: plain\n\nexperiment: {preset: tried}\nlora: {r: 4}\n",
    "hydra/launcher/mine.yaml": "defaults: [slurm, _self_]\npartition: gpu\n",
    "tasks/of_the_harness.yaml": "task: mine\n",  # found by evaluation.harness.include_path
}


def write_own(conf: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = conf / "own" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REPOSITORY / "conf", tmp_path / "conf"))


def test_own_options_stand_beside_the_shipped_ones_and_inherit_from_them(conf: Path) -> None:
    write_own(conf, FILES)
    with composer(conf) as compose:
        values = compose(["dataset=support", "model=mine", "generation=short_ones"])
        tried = compose(["experiment=tried"])
        shipped = compose([])
    chosen = {group: values[group]["preset"] for group in GROUPS}
    assert {"support", "mine", "polite", "short_ones"} <= {*chosen.values()}
    assert values["dataset"]["max_length"] == 1024 and values["model"]["cpu_num_threads"] == 2
    assert (tried["trainer"]["learning_rate"], tried["lora"]["r"]) == (1.0e-5, 4)
    assert tried["trainer"]["max_grad_norm"] == 0.3  # of qlora
    assert tried["chat_template"]["path"] == "conf/own/chat_template/plain.jinja"
    assert shipped["model"]["preset"] == "embedded"


def test_lists_and_words_include_own_options(conf: Path) -> None:
    write_own(conf, FILES)
    assert {"support", "alpaca"} <= {*options.options_of(conf, "dataset")}
    assert "_base" not in options.options_of(conf, "dataset")
    (conf / "own/model/mine.yaml").write_text("preset: mine\nlicence: 12e4567\n")
    assert word_given([], conf)("model.licence", float("inf")) == "12e4567"
    with composer(conf) as compose, pytest.raises(CapasError, match=r"did you mean support\?"):
        compose(["dataset=suport"])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("dataset/alpaca.yaml", "preset: alpaca\n", "conf/dataset/alpaca.yaml has the same name"),
        ("dataset/Alpaca.yaml", "preset: Alpaca\n", "conf/dataset/alpaca.yaml has the same name"),
        ("model/_base.yaml", "preset: ???\n", "conf/model/_base.yaml has the same name"),
        ("chat_template/chatml.jinja", "x", "conf/chat_template/chatml.jinja has the same name"),
        ("overrides.yaml", "seed: 1\n", "conf/overrides.yaml has the same name"),
        ("mine.yaml", "preset: mine\n", r"not in a group; move it to conf/own/GROUP/mine.yaml"),
        ("models/mine.yaml", "preset: mine\n", r"did you mean conf/own/model/mine.yaml\?"),
        ("model/mine.yml", "preset: mine\n", "rename it to mine.yaml"),
        ("dataset/2024.yaml", "preset: '2024'\n", "dataset=2024 is not a valid name"),
        ("dataset/null.yaml", "preset: 'null'\n", "dataset=null is not a valid name"),
        ("model/mine.yaml", "defaults: [embedded]\n", "says no preset; .* must say preset: mine"),
        ("model/mine.yaml", "preset: embedded\n", "says preset: embedded; .* preset: mine"),
        ("sweep/mine.yaml", "preset: grid\n", "says preset: grid; .* preset: mine"),
        (
            "experiment/mine.yaml",
            "experiment: {preset: mine}\n",
            "must begin with the line: # @package _global_",
        ),
        (
            "experiment/mine.yaml",
            "# @package _global_\nexperiment: {preset: x}\n",
            r"experiment: \{preset: mine\}",
        ),
        ("model/mine.yaml", "preset: [\n", "conf/own/model/mine.yaml is not valid YAML"),
    ],
)
def test_what_would_be_a_riddle_is_refused(conf: Path, name: str, text: str, said: str) -> None:
    write_own(conf, {name: text})
    with pytest.raises(CapasError, match=said) as refused, composer(conf):
        pass
    assert f"conf/own/{name}" in str(refused.value)


def test_all_problems_are_told_at_once(conf: Path) -> None:
    write_own(conf, {"model/a.yaml": "", "model/b.yaml": "", ".idea/x.yaml": "", "note.txt": ""})
    with pytest.raises(CapasError, match=r"conf/own has 2 problem\(s\)"):
        options.check(conf)


@pytest.fixture
def workspace(
    composed: Workspace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Composing]:
    """With own options that git does not know, and the file that one of them names."""
    go_offline(monkeypatch)
    caplog.set_level(logging.INFO, "capas")
    made = Composing(composed.root, caplog)
    made.run("git", "checkout", "-q", ".")
    write_own(made.root / "conf", FILES)
    (made.root / "data/own/support.csv").write_text("q,a\nHow?,So.\n")
    yield made
    shutil.rmtree(made.root / "conf/own")
    (made.root / "data/own/support.csv").unlink()


def test_an_experiment_of_own_options_is_one_word_each(workspace: Composing) -> None:
    """DVC composes them, compose expresses them, and another clone of the folder has them."""
    words = ("-S", "dataset=support", "-S", "model=mine", "-S", "chat_template=plain")
    log = workspace.run("dvc", "exp", "run", *words, "compose")
    for line in ("sets dataset=support", "sets model=mine", "sets chat_template=plain"):
        assert line in log
    params = yaml.safe_load(workspace.read("params.yaml"))
    assert params["dataset"]["data_files"] == "data/own/support.csv"
    assert params["evaluation"]["metrics"] == ["chrf"]
    assert workspace.read("data/composed/chat_template.jinja") == FILES["chat_template/plain.jinja"]
    workspace.compose("--reset")
    assert yaml.safe_load(workspace.read("params.yaml"))["dataset"]["preset"] == "embedded"


def test_dvc_refuses_what_would_be_a_riddle_without_a_traceback(workspace: Composing) -> None:
    before = workspace.read("params.yaml")
    write_own(workspace.root / "conf", {"trainer/qlora.yaml": "preset: qlora\n"})
    log = workspace.run("dvc", "exp", "run", "-S", "trainer=qlora", "compose", check=False)
    assert log.startswith("ERROR: conf/own has 1 problem(s)") and "Traceback" not in log
    assert workspace.read("params.yaml") == before


def test_an_experiment_started_in_a_folder_below_would_lose_its_values(
    workspace: Composing,
) -> None:
    command = "cd stages && dvc exp run -S seed=3 ../dvc.yaml:compose"
    log = workspace.run("sh", "-c", command, check=False)
    assert f"start it in {workspace.root}" in log
    assert not (workspace.root / "stages/params.yaml").exists()


def test_an_own_option_that_an_experiment_did_not_take_along_is_named(workspace: Composing) -> None:
    """DVC composed `trainer=slow` in the user's folder, which has the file."""
    with composer(workspace.root / "conf") as run:
        values = run(["trainer=slow"])
    (workspace.root / "conf/own/trainer/slow.yaml").unlink()
    (workspace.root / "conf/own/experiment/tried.yaml").unlink()
    (workspace.root / "params.yaml").write_text(yaml.safe_dump(values))
    said = workspace.refusal(DVC_EXP_NAME="tried")
    assert "trainer=slow: there is no conf/trainer/slow.yaml" in said
    assert "git add conf/own" in said


def test_an_edit_of_an_own_template_reaches_the_stages(workspace: Composing) -> None:
    workspace.compose("--force")
    workspace.experiment("chat_template=plain", "generation.wrong_chat_template=chatml")
    file = workspace.root / "conf/own/chat_template/plain.jinja"
    file.write_text("{# another #}" + file.read_text())
    assert "compose" in workspace.run("dvc", "status", "compose")
    workspace.compose()
    assert workspace.read("data/composed/chat_template.jinja").startswith("{# another #}")


def test_an_own_template_is_the_wrong_one_of_a_report(workspace: Composing) -> None:
    workspace.compose("--force")
    workspace.experiment("generation.wrong_chat_template=plain")
    composed = workspace.read("data/composed/wrong_chat_template.jinja")
    assert composed == FILES["chat_template/plain.jinja"]


def test_an_own_template_without_its_path_is_found_out(workspace: Composing) -> None:
    bare = "defaults: [_base, _self_]\npreset: plain\n"
    write_own(workspace.root / "conf", {"chat_template/plain.yaml": bare})
    said = workspace.refusal("--print", "chat_template=plain", "--files", "x")
    assert "did you mean conf/own/chat_template/plain.jinja?" in said


def test_editors_know_the_keys_of_own_options() -> None:
    settings = yaml.safe_load((REPOSITORY / ".vscode/settings.json").read_text())
    globs = {Path(name).stem: found for name, found in settings["yaml.schemas"].items()}
    overlays = {"experiment"}
    assert globs.keys() == GROUPS.keys() - overlays
    for group, found in globs.items():
        assert found == [f"conf/{group}/*.yaml", f"conf/own/{group}/*.yaml"]
