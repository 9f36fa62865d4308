"""Define the rules between keys of params.yaml, which exclude combinations that no stage can run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from capas.evaluation.names import AUTO, LABEL, is_column_of_curve, names_clash, needs_answers
from capas.hub import embedded


@dataclass(frozen=True)
class Rule:
    """A condition between keys, checked if each of its keys is valid by itself."""

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    expected: str


def _every(names: tuple[str, ...], holds: Callable[[dict[str, Any]], bool]) -> Callable[..., bool]:
    """Return a condition on the values of `names` and of dataset.mix.

    It holds if `holds` is true for the source of `dataset`, which has these values, and for every source of
    mix.
    """
    return lambda *values: all(map(holds, [dict(zip(names, values, strict=False)), *values[-1]]))


def _is_hub(source: dict[str, Any]) -> bool:
    return "/" in source["path"]


def _columns_fit(source: dict[str, Any]) -> bool:
    columns = set(source["columns"] or {})
    if source["shape"] != "columns":
        return not columns
    content = columns & {"messages", "text", "user", "assistant"}
    joined = {name for name, given in (source["columns"] or {}).items() if isinstance(given, list)}
    if joined - {"text", "system", "user", "assistant"}:
        return False
    return content in ({"messages"}, {"text"}, {"user", "assistant"}) and (
        "text" not in columns or not columns & {"system", "reasoning_content"}
    )


# Keys that must all be null for the embedded records.
_GENERATED = ("name", "revision", "split", "data_files", "columns", "roles", "system")
# For every source: (its keys, their condition, what is expected if the condition fails).
_SOURCE_RULES: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], bool], str], ...] = (
    (
        ("path", *_GENERATED),
        lambda s: s["path"] != "embedded" or all(s[key] is None for key in _GENERATED),
        "null but for path: the embedded records are generated",
    ),
    (
        ("path", "data_files"),
        lambda s: (
            (s["data_files"] is not None) == (s["path"] in ("json", "csv", "parquet", "text"))
        ),
        "data_files with path json, csv, parquet or text, and null with any other",
    ),
    (
        ("path", "name", "split"),
        lambda s: (s["split"] is not None) == _is_hub(s) and (s["name"] is None or _is_hub(s)),
        "split with a data set of the Hub (owner/name), and with no other; name only there",
    ),
    (
        ("shape", "columns"),
        _columns_fit,
        "columns with shape columns and with no other: {user, assistant} or {messages}, with perhaps system "
        "and reasoning_content, or {text}; id and tools beside them; several columns for text, system, user "
        "and assistant alone",
    ),
)


def _of_dataset() -> Iterator[Rule]:
    for names, holds, expected in _SOURCE_RULES:
        keys = tuple(f"dataset.{name}" for name in (*names, "mix"))
        yield Rule(keys, _every(names, holds), expected)
    yield Rule(
        ("dataset.path", "dataset.mix"),
        lambda path, mix: not (mix and "embedded" in (path, *(source["path"] for source in mix))),
        "no mixture with the embedded records",
    )
    yield Rule(
        (
            "dataset.path",
            "dataset.num_train",
            "dataset.num_validation",
            "dataset.num_test_per_kind",
        ),
        lambda path, *numbers: all((n is not None) == (path == "embedded") for n in numbers),
        "numbers for path embedded, and null for any other (dataset.max_records makes a subset)",
    )
    yield Rule(
        ("dataset.weight", "dataset.mix"),
        lambda weight, mix: len({w is None for w in (weight, *(s["weight"] for s in mix))}) == 1,
        "a weight for all sources or for none",
    )
    yield Rule(
        ("dataset.validation_fraction", "dataset.test_fraction"),
        lambda validation, test: validation + (0.2 if test is None else test) < 1,
        "together less than 1: something must be left to train on",
    )
    yield Rule(
        ("dataset.split_by", "dataset.near_duplicate_similarity"),
        lambda split_by, similarity: split_by == "prompt" or similarity is not None,
        "a similarity such as 0.6 with split_by=cluster",
    )
    yield Rule(
        ("dataset.leaks", "dataset.leak_budget_fraction"),
        lambda leaks, budget: leaks == "drop" or budget == 0,
        "a budget of 0.0 where leaks are not dropped",
    )
    yield Rule(
        ("dataset.flaws", "dataset.flaw_budget_fraction"),
        lambda flaws, budget: "drop" in flaws.values() or budget == 0,
        "a budget of 0.0 where no flaw is dropped",
    )


# What trainer.backend=unsloth excludes: {key: (the only value that works with it, the reason)}.
_WITH_UNSLOTH: dict[str, tuple[Any, str]] = {
    "hardware.device": ("cuda", "hardware=gpu: Unsloth's kernels are written for an NVIDIA GPU"),
    "hardware.num_processes": (1, "one process with Unsloth"),
    "hardware.cudnn_deterministic": (
        False,
        "false: Unsloth's attention gives other last bits in each run, and no two adapters are equal",
    ),
    "model.attn_implementation": (
        "sdpa",
        "sdpa for the other stages: Unsloth has an attention of its own",
    ),
    "model.trust_remote_code": (False, "a model of transformers' own: Unsloth has code for those"),
    "quantization.load_in_8bit": (False, "quantization=nf4, fp4 or none with Unsloth"),
    "lora.use_dora": (False, "no DoRA: Unsloth's kernels leave it out"),
    "trainer.packing_length": (
        None,
        "null: Unsloth does not see by positions where a record begins",
    ),
    "trainer.use_liger_kernel": (False, "false: Unsloth has kernels of its own"),
    "trainer.fused_lora": (False, "false: Unsloth has kernels of its own"),
}


def _of_unsloth() -> Iterator[Rule]:
    for key, (wanted, why) in _WITH_UNSLOTH.items():
        yield Rule(
            ("trainer.backend", key),
            partial(_goes_with_unsloth, wanted),
            f"{why}; or trainer.backend=transformers",
        )
    yield Rule(
        ("trainer.backend", "lora.r"),
        lambda backend, r: backend != "unsloth" or r is not None,
        "LoRA with Unsloth: lora=all_linear; or trainer.backend=transformers",
    )
    yield Rule(
        ("trainer.backend", "trainer.metric_for_best_model"),
        lambda backend, metric: backend != "unsloth" or not needs_answers(metric),
        "loss or token_accuracy with Unsloth, which changes the model's mode to generate; or "
        "trainer.backend=transformers",
    )
    yield Rule(
        ("trainer.backend", "model.dtype"),
        lambda backend, dtype: backend != "unsloth" or dtype != "float32",
        "bfloat16 with Unsloth, whose kernels take no float32; or trainer.backend=transformers",
    )


def _goes_with_unsloth(wanted: Any, backend: str, found: Any) -> bool:
    return backend != "unsloth" or bool(found == wanted)


RULES = (
    Rule(
        ("evaluation.harness.tasks", "evaluation.harness.include_path"),
        lambda tasks, include_path: bool(tasks) or include_path is None,
        "the names of its tasks in evaluation.harness.tasks, or no folder of tasks (null)",
    ),
    Rule(
        ("quantization.load_in_4bit", "quantization.load_in_8bit"),
        lambda four, eight: not (four and eight),
        "at most one of the two: choose quantization=nf4, fp4, int8 or none",
    ),
    Rule(
        ("lora.init_lora_weights", "lora.r"),
        lambda init, r: init != "orthogonal" or r is None or r % 2 == 0,
        "an even lora.r: orthogonal draws A and B in pairs of rows",
    ),
    Rule(
        ("lora.init_lora_weights", "quantization.load_in_4bit", "quantization.load_in_8bit"),
        lambda init, four, eight: init != "orthogonal" or not (four or eight),
        "true or gaussian: PEFT gives orthogonal matrices the type of the base's weights, here integers",
    ),
    Rule(
        ("lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules"),
        lambda *values: len({value is None for value in values}) == 1,
        "values for all four, or null for all four: lora=none trains all weights, without LoRA",
    ),
    Rule(
        (
            *("lora.r", "lora.use_rslora", "lora.use_dora", "lora.init_lora_weights"),
            *("lora.adapter_name_or_path", "trainer.loraplus_lr_ratio"),
        ),
        lambda r, *of_lora: r is not None or of_lora == (False, False, True, None, None),
        "no option of LoRA where all weights are trained: lora=all_linear, or leave it out",
    ),
    Rule(
        ("lora.r", "quantization.load_in_4bit", "quantization.load_in_8bit"),
        lambda r, four, eight: r is not None or not (four or eight),
        "quantization=none where all weights are trained (lora=none): quantized ones cannot be",
    ),
    Rule(
        ("lora.r", "model.dtype"),
        lambda r, dtype: r is not None or dtype != "float16",
        "model.dtype=float32, or bfloat16, where all weights are trained: float16 overflows",
    ),
    Rule(
        ("lora.init_lora_weights", "lora.adapter_name_or_path"),
        lambda init, name: name is None or init is True,
        "true: the adapter that the training starts from brings its weights",
    ),
    Rule(
        ("lora.adapter_revision", "lora.adapter_name_or_path"),
        lambda revision, name: name is not None or revision is None,
        "null where the training starts from no adapter",
    ),
    Rule(
        ("trainer.bf16", "trainer.fp16"),
        lambda bf16, fp16: not (bf16 and fp16),
        "at most one of the two",
    ),
    Rule(
        ("trainer.fp16", "hardware.device"),
        lambda fp16, device: not fp16 or device == "cuda",
        "hardware=gpu, or trainer.fp16=false (bf16 works on a CPU): fp16 training needs a GPU",
    ),
    Rule(
        ("trainer.fp16", "model.dtype"),
        lambda fp16, dtype: not fp16 or dtype == "float32",
        "model.dtype=float32: fp16 training scales gradients of float32 weights",
    ),
    Rule(
        ("trainer.optim", "hardware.device"),
        lambda optim, device: not optim.startswith("paged_") or device == "cuda",
        "trainer.optim=adamw_torch, or hardware=gpu: a paged optimizer needs a GPU's unified "
        "memory",
    ),
    Rule(
        ("trainer.use_liger_kernel", "hardware.device"),
        lambda liger, device: not liger or device == "cuda",
        "hardware=gpu, or trainer.use_liger_kernel=false: Liger's kernels are written for a GPU",
    ),
    Rule(
        ("trainer.fused_lora", "quantization.load_in_4bit", "trainer.bf16", "trainer.fp16"),
        lambda fused, four, bf16, fp16: not fused or (four and (bf16 or fp16)),
        "quantization=nf4 with trainer.bf16=true, or trainer.fused_lora=false: it is for "
        "4-bit layers and mixed precision",
    ),
    Rule(
        ("trainer.fused_lora", "lora.lora_dropout", "lora.use_dora"),
        lambda fused, dropout, dora: not fused or (not dropout and not dora),
        "without lora_dropout and use_dora, or trainer.fused_lora=false",
    ),
    *_of_unsloth(),
    Rule(
        ("model.attn_implementation", "hardware.device"),
        lambda attention, device: attention != "flash_attention_2" or device == "cuda",
        "model.attn_implementation=sdpa, or hardware=gpu: flash_attention_2 needs a GPU",
    ),
    Rule(
        ("model.attn_implementation", "model.dtype"),
        lambda attention, dtype: attention != "flash_attention_2" or dtype != "float32",
        "half precision in model.dtype: flash_attention_2 computes in bfloat16 or float16",
    ),
    Rule(
        ("hardware.allow_tf32", "hardware.device"),
        lambda tf32, device: not tf32 or device == "cuda",
        "false on a CPU: TF32 is a GPU's format",
    ),
    Rule(
        ("hardware.instruction_set", "hardware.device"),
        lambda instruction_set, device: instruction_set == "native" or device == "cpu",
        "native where the device is not a CPU",
    ),
    Rule(
        ("hardware.cudnn_benchmark", "hardware.cudnn_deterministic"),
        lambda benchmark, deterministic: not (benchmark and deterministic),
        "at most one of the two: what cuDNN's benchmark chooses differs from run to run",
    ),
    Rule(
        ("hardware.num_processes", "lora.r"),
        lambda processes, r: processes == 1 or r is not None,
        "one process where all weights are trained: lora=none learns on one device",
    ),
    Rule(
        ("hardware.num_processes", "hardware.num_machines"),
        lambda processes, machines: processes % machines == 0,
        "as many processes on each machine: num_processes is of all together",
    ),
    Rule(
        ("hardware.distributed_type", "hardware.num_processes"),
        lambda kind, processes: kind == "ddp" or processes > 1,
        "hardware.num_processes=2 or more: fsdp2 divides the model among them",
    ),
    Rule(
        ("hardware.distributed_type", "hardware.device"),
        lambda kind, device: kind == "ddp" or device == "cuda",
        "ddp on a CPU: accelerate divides models among GPUs alone (hardware=gpu_fsdp2)",
    ),
    Rule(
        (
            "hardware.distributed_type",
            "quantization.load_in_4bit",
            "quantization.load_in_8bit",
        ),
        lambda kind, four, eight: kind == "ddp" or not (four or eight),
        "quantization=none: FSDP2 leaves the integers of bitsandbytes whole in each process; or ddp",
    ),
    Rule(
        ("hardware.distributed_type", "trainer.optim"),
        lambda kind, optim: kind == "ddp" or optim.startswith("adamw_torch"),
        "adamw_torch or adamw_torch_fused with fsdp2, whose states torch divides; or ddp",
    ),
    Rule(
        ("hardware.distributed_type", "lora.use_dora"),
        lambda kind, dora: kind == "ddp" or not dora,
        "lora.use_dora=false with fsdp2: PEFT 0.21 takes norms of whole weights; or ddp",
    ),
    Rule(
        ("hardware.distributed_type", "trainer.fp16"),
        lambda kind, fp16: kind == "ddp" or not fp16,
        "trainer.bf16=true with fsdp2, or ddp",
    ),
    Rule(
        (
            "hardware.distributed_type",
            "model.attn_implementation",
            "trainer.packing_length",
        ),
        lambda kind, attention, packing: (
            kind == "ddp" or attention != "flash_attention_2" or packing is None
        ),
        "sdpa with fsdp2: that packed records do not see each other is proven on the CPU, while the model is "
        "whole; or packing_length=null, or ddp",
    ),
    Rule(
        ("trainer.full_determinism", "hardware.cudnn_deterministic"),
        lambda full, deterministic: not full or deterministic,
        "both, or trainer.full_determinism=false: full_determinism switches deterministic "
        "algorithms on",
    ),
    Rule(
        ("model.model_name_or_path", "model.revision"),
        lambda name, revision: name != embedded.FOLDER or revision is None,
        "null: the embedded base ships with the repository and has no other revision",
    ),
    *_of_dataset(),
    Rule(
        ("lora.target_modules",),
        lambda modules: modules not in ("all_linear", "all", "linear"),
        "all-linear, with a hyphen; or a list of names, or a regular expression for whole names",
    ),
    Rule(
        ("lora.use_dora", "quantization.load_in_8bit"),
        lambda dora, eight: not (dora and eight),
        "quantization=nf4 or none, or lora.use_dora=false: DoRA cannot go through int8 layers"
        " (PEFT 0.21)",
    ),
    Rule(
        ("trainer.lr_scheduler_type", "trainer.lr_scheduler_kwargs"),
        lambda kind, kwargs: (
            kind != "cosine_with_min_lr" or ("min_lr" in kwargs) != ("min_lr_rate" in kwargs)
        ),
        "exactly one of min_lr and min_lr_rate in lr_scheduler_kwargs",
    ),
    Rule(
        ("trainer.lr_scheduler_type", "trainer.lr_scheduler_kwargs"),
        lambda kind, kwargs: kind != "warmup_stable_decay" or "num_decay_steps" in kwargs,
        "num_decay_steps in lr_scheduler_kwargs",
    ),
    Rule(
        ("trainer.lr_scheduler_type", "trainer.warmup_steps"),
        lambda kind, steps: kind != "constant" or steps == 0,
        "no warm-up in a constant schedule: warmup_steps=0, or lr_scheduler_type=constant_with_warmup",
    ),
    Rule(
        ("trainer.max_steps", "trainer.warmup_steps"),
        lambda max_steps, warmup_steps: max_steps != 1 or warmup_steps == 0,
        "trainer.warmup_steps=0 with a single step: a warm-up begins at a learning rate of 0, and nothing "
        "would be learned",
    ),
    Rule(
        ("generation.wrong_chat_template", "chat_template.preset"),
        lambda wrong, right: wrong != right,
        "another template than the right one, or null",
    ),
    Rule(
        ("evaluation.metrics",),
        lambda metrics: metrics == AUTO or not names_clash(metrics),
        "each name once, and a function of your own called like no metric and no column of the reports",
    ),
    Rule(
        ("evaluation.metrics",),
        lambda metrics: LABEL not in metrics or len(metrics) == 1,
        "label_accuracy alone: it compares likelihoods, and nothing is generated for other metrics to score",
    ),
    Rule(
        ("evaluation.labels", "evaluation.metrics"),
        lambda labels, metrics: labels is None or metrics == AUTO or LABEL in metrics,
        "evaluation=labels where labels are named, or evaluation.labels=null",
    ),
    Rule(
        ("trainer.load_best_model_at_end", "trainer.save_steps", "trainer.eval_steps"),
        lambda best, save, evaluate: not best or save == evaluate,
        "save_steps equal to eval_steps: the best checkpoint is one that was evaluated",
    ),
    Rule(
        ("trainer.metric_for_best_model",),
        is_column_of_curve,
        "a function of your own called like no metric, no column of the reports and no key of Trainer's log",
    ),
    Rule(
        ("hardware.distributed_type", "trainer.metric_for_best_model"),
        lambda kind, metric: kind == "ddp" or not needs_answers(metric),
        "loss or token_accuracy with fsdp2, whose processes hold no whole model to generate with; or ddp",
    ),
    Rule(
        ("trainer.metric_records", "trainer.metric_for_best_model"),
        lambda number, metric: number is None or needs_answers(metric),
        "null with loss and token_accuracy, which are of the whole validation split",
    ),
    Rule(
        ("trainer.metric_max_new_tokens", "trainer.metric_for_best_model"),
        lambda number, metric: number is None or needs_answers(metric),
        "null with loss and token_accuracy, for which nothing is generated",
    ),
    Rule(("trainer.max_steps",), lambda steps: steps != 0, "-1 (epochs decide) or at least 1"),
    Rule(
        ("trainer.warmup_steps",),
        lambda steps: steps < 1 or float(steps).is_integer(),
        "a fraction below 1, or a whole number of steps",
    ),
    Rule(
        ("chat_template.refused", "chat_template.refused_budget_fraction"),
        lambda refused, budget: refused == "drop" or budget == 0,
        "a budget of 0.0, or refused=drop: refused=error allows none",
    ),
    Rule(
        ("dataset.overflow", "dataset.overflow_budget_fraction"),
        lambda overflow, budget: overflow != "error" or budget == 0,
        "a budget of 0.0, or overflow=drop or truncate: overflow=error allows no record to be"
        " too long",
    ),
)
