"""Estimate the memory that a training needs before it starts, and check that the machine has it.

    weights              of the base; quantized ones 4 or 8 bits per weight, the others model.dtype
                         (if all of them are trained there is no adapter, and the rows below are theirs)
    quantization_state   the scales of 4-bit blocks (Dettmers et al. 2023, section 3) or of int8 rows
    adapter              float32, as PEFT keeps it
    gradients            of the adapter alone, float32
    gradient_buckets     the gradients once more, if several processes average them (DDP)
    gathered_weights     of two layers, if each process holds a shard of all others (FSDP2)
    optimizer            per parameter of the adapter: 8 bytes for AdamW, 2 and the scales for 8-bit AdamW,
    ...
    activations          the most that a step or an evaluation keeps: `capas.training.activations`
    update               if all weights are trained: what the optimizer's step needs beyond that
    allocator            on a CPU, the holes in malloc's heap between them: `capas.training.malloc_heap`

All but the last follow from configuration, data and the installed packages alone. The memory of Python and
its libraries is measured where the training runs. Kernels that keep less are not modelled: with Liger's and
fused LoRA, 9.5 GiB of an estimated 10.8 are used on an H200, 41 of 64 without gradient checkpointing
(benchmarks/results/train_gpu.json). Unsloth's keep less, too.
"""

import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.params import Params
from capas.models.architecture import check_supported, stored_quantization
from capas.training.optimizers import FLOAT32_BYTES, state_bytes

if TYPE_CHECKING:
    from capas.training.activations import Batch, Phase

log = logging.getLogger("capas")
CHECK = "CAPAS_MEMORY_CHECK"  # warn: the estimate stops nothing. No result depends on it
WARN_FRACTION = 0.9
_BLOCK, _SCALES_BLOCK = 64, 256  # weights of a 4-bit block, scales that share a scale
_NUMBERED = re.compile(r".*?\.\d+\.")  # the layer in a parameter's name

# What a model's code may raise for tensors without content, or PEFT if no layer matches.
_ANY_REASON = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, re.error),
)


class EstimateError(CapasError):
    """An error for a model whose training step cannot be traced without real tensors."""


@dataclass(frozen=True)
class Workload:
    """The largest batches of a training, and where it computes.

    `divided` is True if each process holds a shard of the model (FSDP2).
    """

    training: "Batch"
    evaluation: "Batch"
    gradient_check: "Batch"  # for `used_settings.check_gradients`
    on_cpu: bool
    num_processes: int = 1
    divided: bool = False

    @classmethod
    def of(
        cls,
        trainer: Params,
        hardware: Params,
        train: list[int],
        validation: list[int],
    ) -> "Workload":
        """Return the workload with each batch full of the longest records; for one process if several train.

        Args:
            trainer, hardware: params groups.
            train, validation: number of tokens in each record; neither is empty.
        """
        from capas.training.activations import Batch
        from capas.training.batches import NUM_PROBED

        sizes = trainer.per_device_train_batch_size, trainer.per_device_eval_batch_size
        return cls(
            Batch(min(sizes[0], len(train)), max(train)),
            Batch(min(sizes[1], len(validation)), max(validation)),
            Batch(len(validation[:2]), min(NUM_PROBED, max(validation))),
            hardware.device == "cpu",
            hardware.num_processes,
            hardware.distributed_type == "fsdp2",
        )


@dataclass(frozen=True)
class Estimate:
    """The estimated bytes of each part.

    `phase` is the one with the largest activations: training, evaluation or gradient check.
    """

    parts: dict[str, int]
    phase: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(
    folder: Path,
    model: Params,
    lora: Params,
    trainer: Params,
    workload: Workload,
    quantization: dict[str, Any] | None = None,
) -> Estimate:
    """Estimate the memory that the training of a model needs; its weights are not read and need not exist.

    Args:
        folder: a folder with the model's config.json, which may say how its weights are quantized.
        model, lora, trainer: params groups, or the part of them that a stage declares.
        workload: the largest batches.
        quantization: keys of the params group, for a base that is not quantized yet.

    Raises:
        EstimateError: the model cannot be traced.
        CapasError: config.json does not describe a causal language model.
    """
    from capas.training import activations
    from capas.training.lora import trains_all

    facts = read_json(folder / "config.json")
    check_supported(facts, str(folder))
    quantized = _quantized(stored_quantization(facts, str(folder)) or quantization, model)
    try:
        config = activations.unquantized_config(folder, model.trust_remote_code)
        built = activations.build(config, model, lora, quantized)
        phases = _phases(workload, trainer, quantized is not None)
        alive, held = activations.measure(built, phases, of_heap=workload.on_cpu)
    except _ANY_REASON as error:
        raise EstimateError(
            f"the memory of {facts['architectures'][0]} cannot be estimated: "
            f"{type(error).__name__}: {error}"
        ) from error
    phase = max(alive, key=lambda name: alive[name])
    whole = trains_all(lora)
    kept = _of_all(built, trainer.optim) if whole else _of_lora(built, quantized, trainer)
    parts = {**kept, "activations": alive[phase]}
    if workload.divided:
        parts = _divided(parts, built, workload.num_processes)
    elif workload.num_processes > 1:
        parts["gradient_buckets"] = parts["gradients"]
    if whole:
        parts["update"] = max(0, _update_bytes(built, workload.on_cpu) - alive[phase])
    if held is not None:
        parts["allocator"] = max(0, held - alive[phase])
    return Estimate(parts, phase)


def _quantized(config: dict[str, Any] | None, model: Params) -> dict[str, Any] | None:
    """Return how the weights are quantized, None if they are not."""
    if not config or not (config["load_in_4bit"] or config["load_in_8bit"]):
        return None
    return {"bnb_4bit_compute_dtype": model.dtype, **config}


def _of_lora(built: Any, quantized: dict[str, Any] | None, trainer: Params) -> dict[str, int]:
    adapter = [tuple(p.shape) for p in built.parameters() if p.requires_grad]
    frozen = [p for p in built.parameters() if not p.requires_grad]
    num_adapter_bytes = FLOAT32_BYTES * sum(map(math.prod, adapter))
    return {
        "weights": sum(_weight_bytes(p, quantized) for p in frozen),
        "quantization_state": sum(_state_bytes(p, quantized) for p in frozen),
        "adapter": num_adapter_bytes,
        "gradients": num_adapter_bytes,
        "optimizer": state_bytes(trainer.optim, adapter),
    }


def _of_all(built: Any, optim: str) -> dict[str, int]:
    """Return the bytes of each part if all weights are trained; gradients have the dtype of their weights."""
    weights = list(built.parameters())
    num_bytes = sum(p.numel() * p.element_size() for p in weights)
    states = (state_bytes(optim, [tuple(p.shape)], p.element_size()) for p in weights)
    return {
        **{"weights": num_bytes, "quantization_state": 0, "adapter": 0},
        **{"gradients": num_bytes, "optimizer": sum(states)},
    }


def _update_bytes(built: Any, on_cpu: bool) -> int:
    """Return the temporary bytes of an optimizer step.

    On a CPU torch updates one weight at a time. On a GPU it updates all at once, with a copy of a moment.
    """
    sizes = [p.numel() * p.element_size() for p in built.parameters()]
    return 2 * max(sizes) if on_cpu else sum(sizes)


def _divided(parts: dict[str, int], built: Any, num_processes: int) -> dict[str, int]:
    """Return the parts under FSDP2, where each process holds a shard of all that lasts.

    Two layers are whole: one computes while the next one is gathered.
    """
    lasting = ("weights", "adapter", "gradients", "optimizer")
    layers: dict[str, int] = {}
    for name, parameter in built.named_parameters():
        layer = (_NUMBERED.match(name) or [name])[0]
        layers[layer] = layers.get(layer, 0) + int(parameter.numel() * parameter.element_size())
    gathered = sum(sorted(layers.values())[-2:])
    shares = {name: -(-n // num_processes) if name in lasting else n for name, n in parts.items()}
    return {**shares, "gathered_weights": gathered}


def _phases(workload: Workload, trainer: Params, quantized: bool) -> "list[Phase]":
    """Return the phases in the order of the stage.

    Gradients are checked on a CPU alone, before the Trainer exists.
    """
    from capas.training.activations import Phase

    mixed = bool(trainer.bf16 or trainer.fp16)
    evaluation = Phase("evaluation", workload.evaluation, False, False, mixed)
    training = Phase(
        "training",
        workload.training,
        True,
        trainer.gradient_checkpointing,
        mixed,
        trainer.use_liger_kernel,
    )
    check = Phase("gradient check", workload.gradient_check, True, False, False)
    return [*([check] if workload.on_cpu and quantized else []), evaluation, training]


def _is_quantized(parameter: Any) -> bool:
    return bool(getattr(parameter, "of_bitsandbytes", False))


def _weight_bytes(parameter: Any, quantization: dict[str, Any] | None) -> int:
    number = int(parameter.numel())
    if not _is_quantized(parameter) or quantization is None:
        return number * int(parameter.element_size())
    return -(-number // 2) if quantization["load_in_4bit"] else number


def _state_bytes(parameter: Any, quantization: dict[str, Any] | None) -> int:
    """Return the bytes kept beside the 4 or 8 bits of each element of a weight [out, in]."""
    if not _is_quantized(parameter) or quantization is None:
        return 0
    if not quantization["load_in_4bit"]:
        return FLOAT32_BYTES * int(parameter.shape[0])
    blocks = -(-int(parameter.numel()) // _BLOCK)
    if not quantization["bnb_4bit_use_double_quant"]:
        return FLOAT32_BYTES * blocks
    return blocks + FLOAT32_BYTES * -(-blocks // _SCALES_BLOCK)


def check(found: Estimate, used_bytes: int, free_bytes: int, ways: list[str]) -> None:
    """Check that the estimate fits into the available memory; warn above nine tenths of it.

    Args:
        used_bytes: what the process uses already, which the estimate does not contain (`capacity`).
        free_bytes: what the process can still get.
        ways: the advice of `ways_out`.

    Raises:
        CapasError: more is needed than available, and CAPAS_MEMORY_CHECK is not warn.
    """
    there, needed = used_bytes + free_bytes, used_bytes + found.total
    if needed <= WARN_FRACTION * there:
        return
    text = f"{summary(found, used_bytes, free_bytes)}. To need less: {'; '.join(ways)}"
    if needed > there and os.environ.get(CHECK) != "warn":
        raise CapasError(f"{text}. To try anyway, set {CHECK}=warn in the environment.")
    log.warning("%s", text)


def summary(found: Estimate, used_bytes: int, free_bytes: int) -> str:
    """Return a line with what is needed, by part, the largest first, and what is available."""
    parts = {**found.parts, "Python and its libraries": used_bytes}
    listed = sorted(parts.items(), key=lambda item: -item[1])
    text = ", ".join(f"{_named(name, found)} {show(n)}" for name, n in listed if n)
    needed, there = show(used_bytes + found.total), show(used_bytes + free_bytes)
    return f"training needs about {needed} of memory, and {there} are available: {text}"


def _named(part: str, found: Estimate) -> str:
    return f"activations of the {found.phase}" if part == "activations" else part.replace("_", " ")


def costs(found: Estimate, used_bytes: int) -> dict[str, Any]:
    """Return the estimate for reports/timings.

    It is to be compared with peak_memory_bytes, on a GPU with peak_device_memory_bytes.
    """
    parts = {**found.parts, "process": used_bytes}
    return {"estimated_memory_bytes": used_bytes + found.total, "estimated_memory_parts": parts}


def ways_out(found: Estimate, workload: Workload, trainer: Params) -> list[str]:
    """Return advice on the keys to change, the most effective ones first."""
    ways = []
    of_evaluation = found.phase == "evaluation"
    size = "per_device_eval_batch_size" if of_evaluation else "per_device_train_batch_size"
    if found.phase != "gradient check" and trainer[size] > 1:
        accumulate = "" if of_evaluation else " with more gradient_accumulation_steps"
        ways.append(f"trainer.{size} below {trainer[size]}{accumulate}")
    if found.phase == "training" and not trainer.gradient_checkpointing:
        ways.append("trainer.gradient_checkpointing=true")
    batch = workload.evaluation if of_evaluation else workload.training
    ways.append(f"dataset.max_length below {batch.num_tokens}")
    by_weights = [] if found.parts["quantization_state"] else ["quantization=nf4"]
    if workload.divided:
        by_weights = [f"hardware.num_processes above {workload.num_processes}"]
    by_adapter = [f"a smaller lora.r, or trainer.optim=adamw_8bit instead of {trainer.optim}"]
    if "update" in found.parts:
        by_weights = ["lora=all_linear quantization=nf4 instead of lora=none"]
        by_adapter = [f"trainer.optim=adamw_8bit instead of {trainer.optim}"]
    mostly_weights = found.parts["weights"] > found.parts["activations"]
    return (
        [*by_weights, *ways, *by_adapter] if mostly_weights else [*ways, *by_weights, *by_adapter]
    )


def show(num_bytes: int) -> str:
    """Return bytes as MiB, or as GiB from 10 GiB on."""
    if num_bytes < 10 * 2**30:
        return f"{num_bytes / 2**20:,.0f} MiB"
    return f"{num_bytes / 2**30:,.1f} GiB"
