"""QLoRA steps on one GPU: capas, a change a row, beside TRL and Unsloth.

    python benchmarks/train_gpu.py                        about eight minutes on an H100; prints a JSON object
    python benchmarks/train_gpu.py --device cpu --shape tiny --ways capas      a dry run, anywhere

A random model of Llama-3.1-8B's shape in NF4, LoRA r 16 on all linear layers, rows of 2,048 tokens, 8 rows a
step (4 at a time), checkpointed activations, fused AdamW. Weights are random, for speed does not depend on
them. Every way runs in a process of its own, on the same model and the same rows; steps are timed between
synchronizations of the device, and the first ones, which compile, do not count. What is not installed (trl,
liger-kernel, unsloth) is a row with the reason.

`flops_fraction` is the useful work a second (forward, and backward to the inputs; what checkpointing computes
twice counts once) over the rate of a bfloat16 matrix product that is measured in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine

ROOT = Path(__file__).resolve().parents[1]
ROWS, MICRO_BATCH = 8, 4  # of an optimizer step, of a pass
OPTIMIZER = "adamw_torch_fused"
UNTIMED = 3
VOCABULARY = {"8b": 128_256, "1b": 128_256, "tiny": 320}
LENGTH = {"8b": 2048, "1b": 2048, "tiny": 64}
SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "1b": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    },
}
FUSED_LOSS = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True}
COMPILED = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True}
LADDER: dict[str, dict[str, Any]] = {  # of capas: every row has the changes of those above
    "capas, as PEFT prepares it": {"upcast": True},  # norms, embeddings and head in float32
    "capas": {"upcast": False},
    "capas, not deterministic": {"deterministic": False},
    "capas, liger kernels": {"use_liger_kernel": True},
    "capas, fused LoRA": {"fused_lora": True},
    "capas, 2 rows at a time": {"micro_batch": 2},
}
FAST = {"deterministic": False, "use_liger_kernel": True}
KEPT = ", activations kept"
ASIDE: dict[str, dict[str, Any]] = {  # of the ladder's
    f"capas{KEPT}": {**FAST, "fused_lora": True, "gradient_checkpointing": False},
    "capas, compiled layers": {**FAST, "compiled": True, "liger_kernel_config": COMPILED},
}
PEERS = ("trl", "trl, liger kernels", "unsloth", f"unsloth{KEPT}")
WAYS = (*LADDER, *ASIDE, *PEERS)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
OPTIONAL = ("trl", "liger-kernel", "unsloth", "unsloth_zoo", "triton")
ENVIRONMENT = {
    **{"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"UNSLOTH_DISABLE_STATISTICS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ways", nargs="*", default=WAYS, help="of these, in order")
    parser.add_argument("--folder", type=Path, help="where the model lies, or goes: 6 GB")
    parser.add_argument("--seconds", type=int, default=240, help="that a way may take")
    parser.add_argument(
        "--in-all", type=int, default=3600, help="seconds after which no way begins"
    )
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := {*options.ways} - {*WAYS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {WAYS}")
    if options.way:
        print(json.dumps(run_way(options.way, options)))
        return
    with TemporaryDirectory(prefix="train_gpu-") as scratch:
        folder = options.folder or Path(scratch) / "model"
        if not folder.exists():
            told(f"making the model in {folder}")
            call(["--way", "make"], options, folder, options.seconds)
        facts = call(["--way", "facts"], options, folder, options.seconds)
        rows, started = [], time.perf_counter()
        for way in options.ways:
            if time.perf_counter() - started > options.in_all:
                rows.append({"way": way, "error": f"not begun after {options.in_all} seconds"})
                continue
            rows.append({"way": way, **call(["--way", way], options, folder, options.seconds)})
            told(json.dumps(rows[-1]))
    matrix_rate = facts.get("matrix_tflops")
    for row in rows:
        if matrix_rate and "tflops" in row:
            row["flops_fraction"] = round(row["tflops"] / matrix_rate, 3)
    print(json.dumps({"shape": options.shape, **facts, "ways": rows, **described()}, indent=2))


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def described() -> dict[str, Any]:
    """The machine, and the versions of what is installed."""
    found = machine.describe(*PACKAGES)
    for package in OPTIONAL:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    return found


def call(
    arguments: list[str], options: argparse.Namespace, folder: Path, seconds: int
) -> dict[str, Any]:
    """A way in a process of its own; {"error": ...} of one that failed, for the others are worth having."""
    kept = [
        *("--shape", options.shape, "--device", options.device),
        *("--steps", str(options.steps)),
    ]
    command = [sys.executable, __file__, *kept, "--folder", str(folder), *arguments]
    # stages/ and capas/ of this checkout; the working folder is the model's, for Unsloth writes into it.
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(
            command,
            env=env,
            cwd=folder.parent,
            timeout=seconds,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds} seconds"}
    if done.returncode:
        return {"error": " | ".join(done.stderr.strip().splitlines()[-6:])[-1500:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_way(way: str, options: argparse.Namespace) -> dict[str, Any]:
    if way == "make":
        return make_model(options)
    if way == "facts":
        return device_facts(options.device)
    train = {"trl": train_trl, "unsloth": train_unsloth}.get(way.partition(",")[0], train_capas)
    started = time.perf_counter()
    trainer, clock, extra = train(way, options)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    seconds = statistics.median(clock.seconds[UNTIMED:])
    num_tokens = ROWS * LENGTH[options.shape]
    rate = num_tokens / seconds
    return {
        "tokens_per_second": round(rate),
        "step_seconds": round(seconds, 4),
        "step_seconds_range": [round(f(clock.seconds[UNTIMED:]), 4) for f in (min, max)],
        "tflops": round(rate * flops_per_token(options.shape) / 1e12, 1),
        **peak_memory(options.device),
        **extra,
        "losses": [round(loss, 4) for loss in losses],
        "process_seconds": round(time.perf_counter() - started, 1),
    }


def flops_per_token(shape: str) -> float:
    """Of forward and backward; frozen weights have no gradient, so backward is as much as forward.

    2 operations a weight of a linear layer and of the head; attention over half of the row on average, whose
    backward pass is twice its forward one.
    """
    s = SHAPES[shape]
    head_size = s["hidden_size"] // s["num_attention_heads"]
    hidden, inner, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    projections = 2 * hidden * hidden + 2 * hidden * s["num_key_value_heads"] * head_size
    weights = layers * (projections + 3 * hidden * inner) + hidden * VOCABULARY[shape]
    attention = layers * 2 * hidden * LENGTH[shape]  # QK and PV, 2 operations each, causal
    return 2 * 2 * weights + 3 * attention


def make_model(options: argparse.Namespace) -> dict[str, Any]:
    """Random bfloat16 weights, quantized on loading, and a tokenizer of bytes beside them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    started = time.perf_counter()
    config = LlamaConfig(
        vocab_size=VOCABULARY[options.shape],
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **SHAPES[options.shape],
    )
    plain = options.folder.with_name(f"{options.folder.name}-bfloat16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        LlamaForCausalLM(config).save_pretrained(plain)
    torch.set_default_dtype(torch.float32)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        plain,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": options.device},
    )
    model.save_pretrained(options.folder)
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(options.folder)
    for file in plain.iterdir():
        file.unlink()
    return {"seconds": round(time.perf_counter() - started, 1)}


def device_facts(device: str) -> dict[str, Any]:
    """The GPU, and what a large bfloat16 matrix product does on it, of random numbers."""
    import torch

    if device == "cpu":
        return {"device": machine.cpu()}
    size, turns = 8192, 30
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for turn in range(5 + turns):
        if turn == 5:
            torch.cuda.synchronize()
            started = time.perf_counter()
        left @ right
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / turns
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(),
        "device_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "driver": subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip(),
        "cuda": torch.version.cuda,
        "matrix_tflops": round(2 * size**3 / seconds / 1e12, 1),
    }


def peak_memory(device: str) -> dict[str, Any]:
    """Of tensors, and of what the allocator took from the device for them."""
    import torch

    if device == "cpu":
        return {}
    found = {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }
    return {f"{name}_gib": round(number / 2**30, 2) for name, number in found.items()}


def input_ids(options: argparse.Namespace) -> Any:
    """[rows, length]: the same for every way."""
    import torch

    size = options.steps * ROWS, LENGTH[options.shape]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY[options.shape] - 200, size, generator=generator)


def make_clock(device: str) -> Any:
    """A callback of Trainer with `seconds` of each optimizer step."""
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(now() - self.started)

    return Clock()


def changes(way: str) -> dict[str, Any]:
    """Those of the ladder down to this row."""
    if way in ASIDE:
        return ASIDE[way]
    names = list(LADDER)
    return {k: v for name in names[: names.index(way) + 1] for k, v in LADDER[name].items()}


def train_capas(way: str, options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """What the stage `train` does between reading its records and writing the adapter."""
    changed = changes(way)
    params = compose(changed, options)
    from capas.models import hardware

    device = hardware.prepare(params.hardware)
    if changed.get("compiled"):
        del os.environ["TORCHDYNAMO_DISABLE"]
    from peft import prepare_model_for_kbit_training

    from capas.models.loading import load_model
    from capas.training import fused
    from capas.training.arguments import training_arguments
    from capas.training.batches import Collator
    from capas.training.trainer import Trainer
    from stages import train_lora

    upcast = changed.get("upcast", False)
    facts = {} if upcast else {"estimated_gib": estimated_gib(params, options)}
    base = load_model(options.folder, params.model, device)
    if upcast:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = train_lora.add_lora(base, params)
    if params.trainer.fused_lora:
        fused.fuse(model)
    if changed.get("compiled"):
        for layer in model.get_base_model().model.layers:
            layer.compile(dynamic=False)
    clock = make_clock(options.device)
    arguments = training_arguments(params, Path("scratch"), "loss")
    trainer = Trainer(
        model=model,
        args=replace(
            arguments,
            eval_strategy="no",
            eval_on_start=False,
            save_strategy="no",
            liger_kernel_config=changed.get("liger_kernel_config"),
        ),
        train_dataset=[
            {"input_ids": row, "labels": row.clone(), "id": f"{i}"}
            for i, row in enumerate(input_ids(options))
        ],
        data_collator=Collator(2),
        callbacks=[clock],
    )
    return trainer, clock, facts


def estimated_gib(params: Any, options: argparse.Namespace) -> float:
    """What the stage says before it trains."""
    from capas.training import memory

    lengths = [LENGTH[options.shape]] * ROWS
    workload = memory.Workload.of(params.trainer, params.hardware, lengths, lengths[:1])
    groups = params.model, params.lora, params.trainer
    return round(memory.estimate(options.folder, *groups, workload).total / 2**30, 2)


def compose(changed: dict[str, Any], options: argparse.Namespace) -> Any:
    """The shipped recipe's values, with this benchmark's batch and nothing but the row's kernels."""
    from capas.config.composition import composer
    from capas.core.dag import StageSpec
    from capas.core.params import Params, select

    deterministic = changed.get("deterministic", True)
    micro_batch = changed.get("micro_batch", MICRO_BATCH)
    turned = {"use_liger_kernel": False, "fused_lora": False, "gradient_checkpointing": True}
    overrides = [
        "experiment=llama_3.1_8b_qlora_24gb",
        "trainer.packing_length=null",
        f"trainer.optim={OPTIMIZER}",
        "trainer.train_sampling_strategy=sequential",
        "trainer.logging_steps=1",
        "trainer.warmup_steps=0",
        "trainer.lr_scheduler_type=constant",
        "trainer.learning_rate=1e-4",
        "trainer.max_grad_norm=1.0",
        "lora.lora_alpha=16",
        f"trainer.max_steps={options.steps}",
        f"trainer.per_device_train_batch_size={micro_batch}",
        f"trainer.gradient_accumulation_steps={ROWS // micro_batch}",
        *(f"trainer.{name}={changed.get(name, value)}" for name, value in turned.items()),
        f"trainer.full_determinism={deterministic}",
        f"hardware.cudnn_deterministic={deterministic}",
    ]
    if options.device == "cpu":
        overrides += ["hardware=cpu", "hardware.num_threads=1"]
    with composer(ROOT / "conf") as composed:
        return Params(select(composed(overrides), StageSpec.read("train", ROOT).keys))


def shared_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What TRL and Unsloth are given: the same training."""
    return {
        "output_dir": "scratch",
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": ROWS // MICRO_BATCH,
        "max_steps": options.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optim": OPTIMIZER,
        "bf16": True,
        "use_cpu": options.device == "cpu",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": LENGTH[options.shape],
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def rows_of(options: argparse.Namespace) -> Any:
    from datasets import Dataset

    ids = input_ids(options).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


LORA = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ],
}


def train_trl(way: str, options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(
        options.folder,
        dtype=torch.bfloat16,
        device_map={"": options.device},
        attn_implementation="sdpa",
    )
    clock = make_clock(options.device)
    arguments = SFTConfig(
        **shared_arguments(options),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel="liger" in way,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows_of(options),
        processing_class=AutoTokenizer.from_pretrained(options.folder),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[clock],
    )
    return trainer, clock, {}


def train_unsloth(way: str, options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    from unsloth import FastLanguageModel  # first: it patches the others

    import torch  # isort: skip
    from trl import SFTConfig, SFTTrainer  # isort: skip

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(options.folder),
        max_seq_length=LENGTH[options.shape],
        dtype=torch.bfloat16,
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        **LORA,
        use_gradient_checkpointing=False if KEPT in way else "unsloth",
        random_state=0,
    )
    clock = make_clock(options.device)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**shared_arguments(options)),
        train_dataset=rows_of(options),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    return trainer, clock, {}


if __name__ == "__main__":
    main()
