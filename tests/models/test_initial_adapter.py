"""A training that starts from an adapter: whose weights it takes, what it refuses, and what DVC sees."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub, use
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model, read_json, read_params, run_stage, write_workspace
from trainings import ADAPTER, history, results, stop_after, train

from capas.config.pins import Pins
from capas.core.dag import StageSpec
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.stage import Stage
from capas.hub.sources import adapter_revision
from capas.models import adapter
from capas.models.loading import attach_adapter, load_model
from stages import fetch_model, quantize_model, train_lora

pytestmark = pytest.mark.usefixtures("without_estimate")

PLAIN, CPU = Params({"dtype": "float32"}), torch.device("cpu")
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter that a training without one leaves."""
    root = train(tmp_path_factory.mktemp("first"), "quantization=nf4", quantize=True)
    return root / "data/models/adapter"


def initial(folder: Path, root: Path, *overrides: str, **options: Any) -> Path:
    """A workspace whose training starts from the adapter in `folder`, with that adapter fetched."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, root / "first")
    # quoted: a digest of digits and one e is a number to Hydra
    revision = f"lora.adapter_revision='{adapter_revision(folder)}'"
    named = f"lora.adapter_name_or_path=first {revision}"
    write_workspace(root, ["quantization=nf4", *named.split(), *overrides], **options)
    fetch(root)
    run_stage("quantize", quantize_model.main, root)
    return root


def fetch(root: Path) -> None:
    """data/models/initial_adapter alone: the base of the workspace is there already."""
    shutil.rmtree(root / "data/models/initial_adapter")
    stage = Stage(StageSpec.read("fetch_model", root), root)
    fetch_model.fetch_adapter(read_params("fetch_model", root).lora, stage)
    (root / "data/models/.initial_adapter.partial").rename(root / adapter.FOLDER)


def edit(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter whose adapter_config.json says something else."""
    shutil.copytree(folder, target)
    config = read_json(folder / adapter.CONFIG) | changes
    (target / adapter.CONFIG).write_text(json.dumps(config))
    return target


def test_the_training_goes_on_from_its_weights(first: Path, tmp_path: Path) -> None:
    root = initial(first, tmp_path)
    run_stage("train", train_lora.main, root)
    before, after = (history(r, "validation") for r in (first.parents[2], root))
    assert after[0]["loss"] == pytest.approx(before[-1]["loss"], rel=1e-5)
    assert after[-1]["loss"] < after[0]["loss"] < before[0]["loss"]
    facts = read_json(root / "reports/certificate.json")
    assert facts["initial_adapter"] == {
        "adapter_name_or_path": "first",
        "adapter_revision": adapter_revision(first),
        "sha256": hashlib.sha256((first / adapter.WEIGHTS).read_bytes()).hexdigest(),
    }
    assert facts["checks"]["base_unchanged"]


def test_it_begins_with_exactly_these_logits(first: Path, tmp_path: Path) -> None:
    root = initial(first, tmp_path)
    bases = [load_model(root / "data/models/quantized", PLAIN, CPU) for _ in range(2)]
    params, folder = read_params("train", root), root / adapter.FOLDER
    with torch.inference_mode():
        begun = train_lora.add_lora(bases[0], params, folder).eval()(IDS).logits
        assert torch.equal(begun, attach_adapter(bases[1], first)(IDS).logits)


def test_equal_inputs_give_equal_bytes_also_resumed(first: Path, tmp_path: Path) -> None:
    roots = [initial(first, tmp_path / name, "trainer.max_steps=8") for name in ("one", "two")]
    run_stage("train", train_lora.main, roots[0])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("capas.training.callbacks.LiveRows.on_log", stop_after(4))
        run_stage("train", train_lora.main, roots[1])
    run_stage("train", train_lora.main, roots[1])
    assert results(roots[0]) == results(roots[1])


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"use_rslora": True, "r": 2}, {"dtype": "bf16"}]
)
def test_adapters_of_other_tools_are_taken(tmp_path: Path, kind: dict[str, Any]) -> None:
    """As PEFT saves it by itself: all-linear resolved to names, with a dropout of its own, or in bfloat16."""
    folder, lora = tmp_path / "peft", {k: v for k, v in kind.items() if k != "dtype"}
    make_peft_adapter(folder, **lora)
    if "dtype" in kind:
        weights = load_file(folder / adapter.WEIGHTS)
        save_file({k: v.bfloat16() for k, v in weights.items()}, folder / adapter.WEIGHTS)
    options = [f"lora.{key}={str(value).lower()}" for key, value in lora.items()]
    root = initial(folder, tmp_path / "root", "lora.lora_alpha=3", "trainer.max_steps=2", *options)
    run_stage("train", train_lora.main, root)
    assert load_file(root / ADAPTER).keys() == load_file(folder / adapter.WEIGHTS).keys()


def make_peft_adapter(folder: Path, model: Any = None, **lora: Any) -> None:
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 3, "lora_dropout": 0.1, "target_modules": "all-linear", **lora},
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model or make_model(), config)
    torch.manual_seed(3)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    tuned.save_pretrained(folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r=8", r"lora.r=8, the adapter has 4. Set lora.r=4"),
        ("lora.lora_alpha=5", r"lora.lora_alpha=5, the adapter has 32"),
        (
            "lora.use_rslora=true",
            r"lora.use_rslora=True, the adapter has False. Set lora.use_rslora=false",
        ),
        ("lora.use_dora=true", r"lora.use_dora=True, the adapter has False"),
        (
            "lora.target_modules=[q_proj,v_proj]",
            r"lora.target_modules=\[q_proj,v_proj\] adapts 4 layers, and the adapter 14. Set "
            r"lora.target_modules=\[down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj\]",
        ),
    ],
)
def test_a_lora_group_that_contradicts_it_is_refused(
    first: Path, tmp_path: Path, override: str, message: str
) -> None:
    root = initial(first, tmp_path, override)
    with pytest.raises(CapasError, match=f"contradicts the initial adapter first: {message}"):
        run_stage("train", train_lora.main, root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "is not a LoRA adapter: its adapter_config.json says peft_type=IA3"),
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save=\['lm_head'\], which capas does not",
        ),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"bias": "all"}, "bias=all"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"something_of_2030": 3}, "something_of_2030=3"),
    ],
)
def test_what_capas_cannot_carry_is_refused_as_it_is_fetched(
    first: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CapasError, match=message):
        initial(edit(first, tmp_path / "odd", **change), tmp_path / "root")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"intermediate_size": 96}, "the shapes of .* differ, so it is an adapter of another base"),
        ({"num_hidden_layers": 3}, "another base: this one has no layer called .*layers.2"),
        ({"num_hidden_layers": 1}, "adapts 14 layers, and the adapter 7"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, other: dict[str, int], message: str
) -> None:
    make_peft_adapter(tmp_path / "peft", make_model(**other))
    root = initial(tmp_path / "peft", tmp_path / "root", "lora.lora_alpha=3")
    with pytest.raises(CapasError, match=message):
        run_stage("train", train_lora.main, root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {**w, "base_model.model.lm_head.weight": torch.ones(2)},
            "that are not LoRA weights",
        ),
        (lambda w: {k: v * float("nan") for k, v in w.items()}, "NaN or infinite"),
        (
            lambda w: {k: v for k, v in w.items() if "0.mlp.up_proj.lora_B" not in k},
            "not have the weights that PEFT",
        ),
    ],
)
def test_damaged_weights_are_refused(
    first: Path, tmp_path: Path, change: Any, message: str
) -> None:
    folder = Path(shutil.copytree(first, tmp_path / "odd"))
    weights = load_file(folder / adapter.WEIGHTS)
    (folder / adapter.WEIGHTS).unlink()
    save_file({k: v.clone() for k, v in change(weights).items()}, folder / adapter.WEIGHTS)
    root = initial(folder, tmp_path / "root")
    with pytest.raises(CapasError, match=message):
        run_stage("train", train_lora.main, root)


def test_a_cut_file_and_a_pickle_are_refused(first: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(first, tmp_path / "cut"))
    whole = (cut / adapter.WEIGHTS).read_bytes()
    (cut / adapter.WEIGHTS).unlink()
    with pytest.raises(CapasError, match=r"has no adapter_model.safetensors. Loading an adapter_m"):
        initial(cut, tmp_path / "none")
    (cut / adapter.WEIGHTS).write_bytes(whole[:1000])
    root = initial(cut, tmp_path / "root")
    with pytest.raises(CapasError, match=r"adapter_model\.safetensors of first is damaged"):
        run_stage("train", train_lora.main, root)
    (cut / adapter.CONFIG).unlink()
    with pytest.raises(
        CapasError, match=r"has no adapter_config.json, so it is not an adapter in PEFT's"
    ):
        initial(cut, tmp_path / "model")


def test_a_training_that_learns_nothing_is_refused(first: Path, tmp_path: Path) -> None:
    root = initial(first, tmp_path, "trainer.learning_rate=1.0e-30")
    with pytest.raises(CapasError, match="the adapter equals the initial adapter"):
        run_stage("train", train_lora.main, root)


def test_another_adapter_than_the_fetched_one_is_refused(first: Path, tmp_path: Path) -> None:
    root = initial(first, tmp_path)
    (root / "params.yaml").write_text(
        (root / "params.yaml").read_text().replace("th: first", "th: x")
    )
    with pytest.raises(
        CapasError, match=r"lora.adapter_name_or_path=x, but .* was fetched for first"
    ):
        run_stage("train", train_lora.main, root)


def test_a_folder_is_pinned_to_what_is_in_it(first: Path, tmp_path: Path) -> None:
    root = initial(first, tmp_path)
    weights = load_file(root / "first" / adapter.WEIGHTS)
    (root / "first" / adapter.WEIGHTS).unlink()
    save_file({k: v * 2 for k, v in weights.items()}, root / "first" / adapter.WEIGHTS)
    with pytest.raises(
        CapasError, match=r"lora.adapter_revision=\w+: first is a folder, and its content"
    ):
        fetch(root)


def values(name: str | None, revision: str | None = None) -> dict[str, Any]:
    return {
        "model": {"model_name_or_path": "data/embedded", "revision": None},
        "lora": {"adapter_name_or_path": name, "adapter_revision": revision},
        "dataset": {"path": "embedded", "revision": None},
    }


def test_compose_pins_folders_and_repositories(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(first, tmp_path / "first")
    pins = Pins({}, tmp_path)
    assert pins.resolve(values(None)) == values(None)
    found = pins.resolve(values("first"))["lora"]
    assert found["adapter_revision"] == adapter_revision(first)
    with Hub() as hub:
        use(hub, tmp_path / "home", monkeypatch)
        files = {name: (first / name).read_bytes() for name in (adapter.CONFIG, adapter.WEIGHTS)}
        commit = hub.commit("models/org/adapter", files)
        assert pins.resolve(values("org/adapter"))["lora"]["adapter_revision"] == commit
    assert pins.entries == {
        "adapters": {"first": adapter_revision(first)},
        "models": {"org/adapter@main": commit},
    }
    (tmp_path / "revisions.yaml").write_text(pins.dump())
    assert Pins.read(tmp_path / "revisions.yaml", tmp_path).entries == pins.entries


def test_an_adapter_of_the_hub_is_fetched_at_its_commit(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub() as hub:
        use(hub, tmp_path / "home", monkeypatch)
        files = {name: (first / name).read_bytes() for name in (adapter.CONFIG, adapter.WEIGHTS)}
        commit = hub.commit("models/org/adapter", {**files, "adapter_model.bin": b"pickle"})
        named = ["lora.adapter_name_or_path=org/adapter", f"lora.adapter_revision='{commit}'"]
        (root := tmp_path / "root").mkdir()
        write_workspace(root, ["quantization=nf4", *named])
        fetch(root)
    run_stage("quantize", quantize_model.main, root)
    run_stage("train", train_lora.main, root)
    found = {file.name for file in (root / adapter.FOLDER).iterdir()}
    assert found == {adapter.ORIGIN, adapter.CONFIG, adapter.WEIGHTS}
    assert (
        read_json(root / "reports/certificate.json")["initial_adapter"]["adapter_revision"]
        == commit
    )


@pytest.mark.parametrize("name", ["data/models/adapter", "./data/models/../models/adapter"])
def test_the_pipelines_own_adapter_is_no_start(first: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(first, tmp_path / "data/models/adapter")
    with pytest.raises(CapasError, match=r"Copy the adapter first: cp -rL"):
        Pins({}, tmp_path).resolve(values(name))
