"""trainer.backend=unsloth: refused where it cannot be, and otherwise another way to the same adapter.

Its kernels need a GPU (test_gpu.py). Here a stand-in has its interface; where the extra is installed,
Unsloth itself takes part, with what it computes on CPUs.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from shipped import composed
from tiny import REPOSITORY, read_json, run_stage
from trainings import ADAPTER, history, prepared, results, train

from capas.config.validation import validate
from capas.core import extras
from capas.core.errors import CapasError
from capas.training import unsloth
from stages import quantize_model, train_lora

pytestmark = pytest.mark.usefixtures("without_estimate")

# Unsloth on a CPU takes the fused AdamW.
OPTIONS = ("quantization=nf4", "trainer.max_steps=8", "trainer.optim=adamw_torch_fused")
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PINS = {
    extra: dict(item.split("==") for item in PYPROJECT["project"]["optional-dependencies"][extra])
    for extra in extras.VERSIONS
}
GPU = (
    *("hardware=gpu", "hardware.cudnn_deterministic=false"),
    *("trainer=unsloth", "model.dtype=bfloat16"),
)


def compose(*overrides: str) -> dict[str, Any]:
    values: dict[str, Any] = composed(["trainer.backend=unsloth", *overrides])
    validate(values)
    return values


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"trainer.backend='unsloth', hardware.device='cpu': .*written for an NVIDIA GPU"),
        ((*GPU, "hardware.num_processes=2"), "one process with Unsloth"),
        ((*GPU, "lora=none", "quantization=none"), "LoRA with Unsloth"),
        ((*GPU, "lora.use_dora=true"), "no DoRA"),
        ((*GPU, "quantization=int8"), "nf4, fp4 or none with Unsloth"),
        ((*GPU, "trainer.packing_length=512"), "does not see by positions"),
        ((*GPU, "trainer.metric_for_best_model=chrf"), "loss or token_accuracy with Unsloth"),
        ((*GPU, "trainer.use_liger_kernel=true"), "use_liger_kernel=True: expected false: Unsloth"),
        ((*GPU, "trainer.fused_lora=true"), "fused_lora=True: expected false: Unsloth"),
        ((*GPU, "hardware.cudnn_deterministic=true"), "gives other last bits in each run"),
        ((*GPU, "model.attn_implementation=eager"), "an attention of its own"),
        ((*GPU, "model.dtype=float32"), "kernels take no float32"),
        ((*GPU, "model.trust_remote_code=true"), "a model of transformers' own"),
    ],
)
def test_what_it_cannot_do_is_refused_when_conf_is_composed(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CapasError, match=message) as told:
        compose(*overrides)
    assert "or trainer.backend=transformers" in str(told.value)


def test_with_a_gpu_it_is_composed() -> None:
    trainer = compose(*GPU)["trainer"]
    assert (trainer["preset"], trainer["backend"]) == ("unsloth", "unsloth")


def test_the_extras_are_the_versions_that_the_code_was_made_for() -> None:
    assert extras.VERSIONS == PINS


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "VERSIONS", {"gpu": {"torch": "1.0"}, "none": {"no-such": "1"}})
    with pytest.raises(CapasError, match=r"needs torch 1\.0, and torch 2\..* is installed: pip"):
        extras.require("gpu", "trainer.x=true")
    with pytest.raises(CapasError, match=r"no-such is not installed: pip install -e '\.\[none\]'"):
        extras.require("none", "trainer.x=true")


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.apply_qkv, self.apply_o = fused, fused
        self.forward = MethodType(partial(fused), self)


def fused(*args: Any) -> None:
    """A kernel of Unsloth."""


def causal_lm(*args: Any) -> None:
    """The forward of a whole model."""


fused.__module__, causal_lm.__module__ = "unsloth.kernels.fast_lora", "unsloth.models.llama"


def test_what_it_computes_is_read_off_the_model() -> None:
    model = torch.nn.Sequential(Mlp(), torch.nn.Linear(2, 2), Mlp())
    assert unsloth.describe(model) is None
    model.forward = causal_lm
    assert unsloth.describe(model) == {
        "version": "2026.10.9",
        "fused": {"mlp": 2, "qkv": 2, "o": 2},
    }


def with_unsloth(
    root: Path, *site: Path, fallback: str = "0"
) -> "subprocess.CompletedProcess[str]":
    """The stage as DVC runs it."""
    path = os.pathsep.join([*map(str, (REPOSITORY, *site)), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "UNSLOTH_DISABLE_CPU_FALLBACK": fallback}
    return subprocess.run(
        [sys.executable, "stages/train_lora.py"], cwd=root, env=env, capture_output=True, text=True
    )


def quantized(root: Path, *overrides: str) -> Path:
    """Params that name Unsloth for a CPU, which compose would refuse, and a quantized base."""
    prepared(root, *OPTIONS, *overrides)
    run_stage("quantize", quantize_model.main, root)
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("backend: transformers", "backend: unsloth"))
    return root


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    (site / "unsloth").mkdir()
    shutil.copy(REPOSITORY / "tests/support/unsloth_standin.py", site / "unsloth/__init__.py")
    for name, version in extras.VERSIONS["unsloth"].items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return site


CHECKPOINTING, GAUSSIAN = "trainer.gradient_checkpointing=true", "lora.init_lora_weights=gaussian"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((CHECKPOINTING,), marks=pytest.mark.slow),
        pytest.param((GAUSSIAN,), marks=pytest.mark.slow),
        (CHECKPOINTING, GAUSSIAN),
    ],
)
def test_data_adapter_and_reports_are_the_same(
    tmp_path: Path, standin: Path, options: tuple[str, ...]
) -> None:
    plain = train(tmp_path / "plain", *OPTIONS, *options, quantize=True)
    other = quantized(tmp_path / "unsloth", *options)
    done = with_unsloth(other, standin)
    assert done.returncode == 0, done.stderr
    assert results(other).items() - results(plain).items() == {
        ("reports/train.json", (other / "reports/train.json").read_bytes())
    }
    facts, expected = (read_json(root / "reports/train.json") for root in (other, plain))
    version, fused = extras.VERSIONS["unsloth"]["unsloth"], {"mlp": 0, "qkv": 0, "o": 0}
    assert facts["used"].pop("unsloth") == {"version": version, "fused": fused}
    assert facts["used"].pop("attn_implementation") == "unsloth"
    assert expected["used"].pop("attn_implementation") == "sdpa"
    assert facts.pop("train_key") != expected.pop("train_key")
    assert facts == expected


def test_without_a_gpu_the_stage_says_what_unsloth_says(tmp_path: Path, standin: Path) -> None:
    done = with_unsloth(quantized(tmp_path), standin, fallback="1")
    assert done.returncode == 1
    assert (
        "Unsloth does not support this machine: Unsloth cannot find any torch accelerator"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_record_beyond_the_models_positions_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth would stretch the positions to hold it."""
    root = quantized(tmp_path)
    config = root / "data/models/quantized/config.json"
    text = config.read_text()
    config.write_text(
        text.replace('"max_position_embeddings": 512', '"max_position_embeddings": 9')
    )
    monkeypatch.setattr(unsloth, "prepare", lambda root: None)
    monkeypatch.setattr(unsloth, "load_base", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(CapasError, match="the model's context is 9"):
        run_stage("train", train_lora.main, root)


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_not_installed_it_is_named(tmp_path: Path) -> None:
    message = r"trainer.backend=unsloth needs unsloth 2026\.10\.9, and unsloth is not installed"
    with pytest.raises(CapasError, match=message):
        run_stage("train", train_lora.main, quantized(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("unsloth") is None, reason="needs pip install -e '.[unsloth]'")
def test_unsloth_itself_trains_on_a_cpu(tmp_path: Path) -> None:
    """Its loader, its LoRA and its patches of transformers; the kernels are torch's there."""
    plain = train(tmp_path / "plain", *OPTIONS, quantize=True)
    other = quantized(tmp_path / "unsloth")
    done = with_unsloth(other)
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in history(root)] for root in (other, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    folder = Path(ADAPTER).parent / "adapter_config.json"
    assert (other / folder).read_bytes() == (plain / folder).read_bytes()


def test_the_extra_resolves_against_the_lock(tmp_path: Path) -> None:
    """pip finds versions of all that Unsloth needs beside those of requirements.lock."""
    wanted = [f"{name}=={version}" for name, version in extras.VERSIONS["unsloth"].items()]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--retries", "0"]
    lock = ["--constraint", str(REPOSITORY / "requirements.lock")]
    done = subprocess.run([*command, *lock, *wanted], capture_output=True, text=True)
    if "(from versions: none)" in done.stderr:
        pytest.skip("no package index here")
    assert done.returncode == 0, done.stderr
