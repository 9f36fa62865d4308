"""Every recipe of conf/experiment, as a tiny model of its architecture, from the records to the report."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_presets
import yaml
from architectures import write_whole
from safetensors.torch import load_file
from tiny import REPOSITORY, read_json, run_stage, write_lock

from capas.config.composition import composer
from capas.config.kept_overrides import absorb
from capas.config.validation import validate
from capas.core.params import Params
from capas.training import memory
from stages import build_report, fetch_dataset, publish_run

EXPERIMENTS = sorted(f.stem for f in (REPOSITORY / "conf/experiment").glob("*.yaml"))
RECIPES = [name for name in EXPERIMENTS if name not in ("none", "quick")]
QUICK = "qwen2.5_0.5b_lora_cpu"  # the others in the slow tier
STAGES: dict[str, Callable[..., None]] = {
    "fetch": fetch_dataset.main,
    **test_presets.STAGES,
    "report": build_report.main,
    "publish": publish_run.main,
}
OWN = (
    *("dataset=own_jsonl", "dataset.validation_fraction=0.2", "dataset.test_fraction=0.2"),
    "dataset.split_by=prompt",
)


class Made(NamedTuple):
    name: str
    root: Path
    values: dict[str, Any]


@cache
def compose(*overrides: str) -> dict[str, Any]:
    with composer(REPOSITORY / "conf") as run:
        values = run(list(overrides))
    validate(values)
    return values


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n == QUICK else pytest.mark.slow) for n in RECIPES],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Made]:
    name, root = request.param, tmp_path_factory.mktemp("recipe")
    values = write_recipe(name, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage, main in STAGES.items():
            if stage == "train" and values["hardware"]["num_processes"] > 1:
                subprocess.run([sys.executable, "stages/train_lora.py"], cwd=root, check=True)
            else:
                run_stage(stage, main, root)
    yield Made(name, root, values)


def write_recipe(name: str, root: Path) -> dict[str, Any]:
    """The recipe in small, with a model of its architecture in `local` and records of one's own."""
    preset = compose(f"experiment={name}")["model"]["preset"]
    return write_tiny(preset, root, f"experiment={name}")


def write_tiny(preset: str, root: Path, *overrides: str) -> dict[str, Any]:
    """A workspace in small as it stands before fetch, with a model of the preset's architecture."""
    model = test_presets.write_local(preset, root)
    values = compose(f"model={preset}", "+smoke=tiny", *model, *OWN, *overrides)
    if values["evaluation"]["metrics"] == "auto":  # as compose would choose by the records below
        values["evaluation"]["metrics"] = ["exact_match", "chrf"]
    test_presets.write_composed(values, root)
    (root / "conf").mkdir(exist_ok=True)
    (root / "conf/overrides.yaml").write_text("# Nothing overridden.\n")
    if not (root / "conf/chat_template").exists():
        shutil.copytree(REPOSITORY / "conf/chat_template", root / "conf/chat_template")
    rows = [{"question": f"timer {n}", "answer": f"{n} minutes"} for n in range(40)]
    (root / "data/own").mkdir()
    (root / "data/own/mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_lock(root)
    return values


def test_there_are_as_many_recipes_as_we_think() -> None:
    assert len(RECIPES) == 7
    assert QUICK in RECIPES


def test_the_recipe_goes_through_all_stages(made: Made) -> None:
    spec = (REPOSITORY / "dvc.yaml").read_text()
    assert {*STAGES, "compose"} == set(re.findall(r"^  (\w+):$", spec.split("\nplots:")[0], re.M))
    facts = read_json(made.root / "reports/train.json")
    assert facts["num_steps"] == 2
    adapter = load_file(made.root / "data/models/adapter/adapter_model.safetensors")
    assert all(weight.any() for weight in adapter.values())
    assert "<html" in (made.root / "reports/index.html").read_text()


def test_it_trains_as_the_recipe_says(made: Made) -> None:
    """But for the optimizer, which needs the GPU, and for sizes: smoke changes those alone."""
    used = read_json(made.root / "reports/train.json")["used"]
    recipe = compose(f"experiment={made.name}")
    assert used["quantization"] == recipe["quantization"]["preset"]
    assert used["gradient_checkpointing"] is recipe["trainer"]["gradient_checkpointing"]
    assert used["attn_implementation"] == recipe["model"]["attn_implementation"]
    mixed = "bf16" if recipe["trainer"]["bf16"] else "no"
    assert used["accelerate"]["mixed_precision"] == mixed
    assert used["accelerate"]["num_processes"] == recipe["hardware"]["num_processes"]
    for key in ("learning_rate", "lr_scheduler_type", "warmup_steps", "gradient_checkpointing"):
        assert made.values["trainer"][key] == recipe["trainer"][key]


STATED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "packing_length", "optim"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "gradient_checkpointing"),
)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_what_decides(name: str) -> None:
    """In its own file, so that it can be read there and no edit of another one changes it."""
    own = yaml.safe_load((REPOSITORY / f"conf/experiment/{name}.yaml").read_text())
    assert set(STATED) <= own["trainer"].keys()
    assert "max_length" in own["dataset"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_records_of_ones_own(name: str) -> None:
    values = compose(f"experiment={name}", "dataset=own_jsonl")
    assert values["dataset"]["preset"] == "own_jsonl"
    assert values["experiment"]["preset"] == name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_was_run_in_small_is_recorded(name: str, tmp_path: Path) -> None:
    """What `dvc exp run -S experiment=... -S +smoke=tiny` leaves in conf/ composes to the same."""
    conf = Path(shutil.copytree(REPOSITORY / "conf", tmp_path / "conf"))
    wanted = compose(f"experiment={name}", "+smoke=tiny")
    absorb(wanted, lambda values: values, conf)
    with composer(conf) as run:
        assert run([]) == wanted


@pytest.mark.parametrize("name", RECIPES)
def test_the_memory_in_the_comment_is_the_estimate(name: str, tmp_path: Path) -> None:
    """Of the largest batch that dataset.max_length allows; the card must hold it, and its reserve."""
    comment = (REPOSITORY / f"conf/experiment/{name}.yaml").read_text()
    (told,) = re.findall(r"(\d+\.\d) GiB", comment)
    params = Params(compose(f"experiment={name}"))
    folder = write_whole(params.model.preset, tmp_path)
    sizes = params.trainer.per_device_train_batch_size, params.trainer.per_device_eval_batch_size
    lengths = [[params.dataset.max_length] * size for size in sizes]
    workload = memory.Workload.of(params.trainer, params.hardware, *lengths)
    groups = params.model, params.lora, params.trainer
    found = memory.estimate(folder, *groups, workload, params.quantization.without("preset"))
    tensors = found.total - found.parts.get("allocator", 0)  # that one is asked anew each time
    assert f"{tensors / 2**30:.1f}" == told
    if card := re.search(r"(\d+)gb$", name):
        assert found.total < 0.9 * int(card[1]) * 1e9
