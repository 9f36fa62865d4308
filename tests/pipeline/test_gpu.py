"""What holds on a CPU holds on an NVIDIA GPU: `make test-gpu`. No test here runs without one."""

import json
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import REPOSITORY, read_json, run_stage
from trainings import history, prepared, results, run_in_process, stopped_once, train

from stages import evaluate_model, quantize_model, sample_outputs

pytestmark = pytest.mark.gpu
GPU = ("hardware=gpu", "hardware.num_threads=1")
QLORA = (  # as the recipes for GPUs have it
    *GPU,
    *("quantization=nf4", "model.dtype=bfloat16", "trainer.bf16=true"),
    *("trainer.gradient_checkpointing=true", "trainer.optim=paged_adamw_8bit"),
    "trainer.packing_length=160",
)
UNSLOTH = (*GPU, "hardware.cudnn_deterministic=false", "model.dtype=bfloat16", "trainer=unsloth")
FLOAT32 = (*GPU, "hardware.allow_tf32=false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), *QLORA, quantize=True)


def test_it_computes_with_what_the_recipes_ask_for(trained: Path) -> None:
    used = read_json(trained / "reports/train.json")["used"]
    asked = {
        **{"device": "cuda", "quantization": "nf4", "linear_kernel": "bitsandbytes.matmul_4bit"},
        **{"optimizer_paged": True, "optimizer_bits": 8, "tf32": True},
        **{"gradient_checkpointing": True, "deterministic_algorithms": True},
    }
    assert {name: used[name] for name in asked} == asked
    assert used["accelerate"]["mixed_precision"] == "bf16"


def test_the_same_training_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    assert results(train(tmp_path, *QLORA, quantize=True)) == results(trained)


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_8bit", "adamw_torch_fused"])
def test_stopped_and_resumed_it_gives_the_same_bytes(tmp_path: Path, optim: str) -> None:
    options = (*GPU, f"trainer.optim={optim}", "trainer.bf16=true", "lora.lora_dropout=0.1")
    options += ("trainer.max_steps=24", "trainer.save_steps=5")
    undisturbed = train(tmp_path / "undisturbed", *options)
    assert results(stopped_once(tmp_path / "stopped", 18, *options)) == results(undisturbed)


def test_losses_are_those_of_a_cpu(tmp_path: Path) -> None:
    roots = [
        train(tmp_path / "gpu", *FLOAT32),
        train(tmp_path / "cpu", "hardware.num_threads=1"),
    ]
    losses = [[row["loss"] for row in history(root)] for root in roots]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("preset", ["nf4", "fp4", "int8"])
def test_weights_are_quantized_as_on_a_cpu(tmp_path: Path, preset: str) -> None:
    found = []
    for name, hardware in (("gpu", GPU), ("cpu", ("hardware.num_threads=1",))):
        root = train(
            tmp_path / name,
            *hardware,
            f"quantization={preset}",
            "trainer.max_steps=2",
            quantize=True,
        )
        found.append(read_json(root / "reports/quantization.json")["relative_error_mean"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        ("trainer.fp16=true",),
        ("trainer.fp16=true", "quantization=int8"),
        ("model.dtype=bfloat16", "quantization=int8"),
        ("model.dtype=float16", "quantization=nf4"),
        ("lora.use_dora=true", "quantization=nf4", "trainer.bf16=true"),
        ("model.attn_implementation=eager", "trainer.packing_length=160"),
        ("trainer.loraplus_lr_ratio=4", "trainer.optim=adamw_8bit"),
    ],
    ids=lambda options: "-".join(o.rpartition(".")[2] for o in options),
)
def test_a_combination_trains(tmp_path: Path, options: tuple[str, ...]) -> None:
    root = train(tmp_path, *GPU, *options, quantize=True)
    losses = [row["loss"] for row in history(root, "validation")]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(find_spec("unsloth") is None, reason="needs pip install -e '.[unsloth]'")
@pytest.mark.parametrize(
    "options", [("quantization=nf4",), ("trainer.gradient_checkpointing=false",)]
)
def test_unsloth_learns_the_same(tmp_path: Path, options: tuple[str, ...]) -> None:
    """In processes of their own: Unsloth changes transformers for all that comes after it."""
    losses = []
    for backend in ("transformers", "unsloth"):
        root = prepared(tmp_path / backend, *UNSLOTH, *options, f"trainer.backend={backend}")
        run_stage("quantize", quantize_model.main, root)
        out, _ = (process := run_in_process(root)).communicate()
        assert process.returncode == 0, out
        run_stage("evaluate_base", partial(evaluate_model.main, "base"), root)
        run_stage("evaluate", partial(evaluate_model.main, "tuned"), root)
        losses.append([row["loss"] for row in history(root)])
    used = read_json(root / "reports/train.json")["used"]
    assert used["unsloth"]["fused"] == {"mlp": 2, "qkv": 0, "o": 2}  # Qwen 2 has biases in QKV
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1][-1] < losses[1][0]


def test_evaluation_and_samples_repeat(trained: Path) -> None:
    outs = ("reports/evaluation_base.json", "reports/evaluation.json", "reports/samples.json")
    found = []
    for _ in range(2):
        run_stage("evaluate_base", partial(evaluate_model.main, "base"), trained)
        run_stage("evaluate", partial(evaluate_model.main, "tuned"), trained)
        run_stage("sample", sample_outputs.main, trained)
        found.append([(trained / name).read_bytes() for name in outs])
    assert found[0] == found[1]


def test_memory_is_what_was_estimated() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/memory.py", "--device", "cuda"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = {run["name"]: run["error_fraction"] for run in json.loads(done.stdout)["runs"]}
    assert errors and all(abs(error) < 0.15 for error in errors.values()), errors
