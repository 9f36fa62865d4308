"""The schema of params.yaml: every key, its type and range, and the rules between keys.

Imported by compose alone, so that a new key reruns no stage but those that declare it. There are no
defaults here: values live in conf/ only. One class per group; the class, the folder in conf/ and the
key in params.yaml have the same name.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from capas.config.elsewhere import answer_to_key, answer_to_value
from capas.config.problems import Problem, refused
from capas.core.errors import without_secrets
from capas.core.params import flatten
from capas.evaluation.names import AUTO, OWN_FUNCTION, BuiltIn, names_clash
from capas.hub import embedded
from capas.training import steps

Word = Callable[[str, Any], str | None]
Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Dtype = Literal["float32", "bfloat16", "float16"]
InstructionSet = Literal["portable", "native", "avx2", "avx512"]


class Group(BaseModel):
    """A group of conf/. `preset` is the stem of the chosen file, so that a choice can be read back."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    preset: str


class Hardware(Group):
    """num_processes and num_machines are those of `accelerate launch`; model.dtype is dtype by default.

    num_threads=None: as many as there are physical cores.
    """

    device: Literal["cpu", "cuda"]
    dtype: Dtype
    num_processes: Count
    num_machines: Count
    distributed_type: Literal["ddp", "fsdp2"]
    num_threads: Count | None
    instruction_set: InstructionSet
    allow_tf32: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool


class Model(Group):
    """`AutoModelForCausalLM.from_pretrained`; pad_token, licence and cpu_* are capas' own."""

    model_name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None
    dtype: Dtype
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"]
    trust_remote_code: bool
    pad_token: Annotated[str, Field(min_length=1)] | None
    cpu_instruction_set: InstructionSet
    cpu_num_threads: Count | None
    licence: str


class Flaws(BaseModel):
    """What is done about each kind of flaw of a record; null is what is done about `malformed`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    malformed: Literal["error", "drop"]
    bad_json: Literal["error", "drop"] | None
    bad_row: Literal["error", "drop"] | None
    missing_column: Literal["error", "drop"] | None
    not_text: Literal["error", "drop"] | None
    unknown_role: Literal["error", "drop"] | None
    empty_question: Literal["error", "drop", "keep"] | None
    bad_call: Literal["error", "drop"] | None
    unclear_training: Literal["error", "drop"] | None
    no_answer: Literal["error", "drop"]
    empty_answer: Literal["error", "drop"]
    invalid_text: Literal["error", "drop", "replace"]
    consecutive_roles: Literal["error", "drop", "merge", "keep"]
    system_in_the_middle: Literal["error", "drop", "keep"]
    assistant_first: Literal["error", "drop", "skip"]


class Reading(BaseModel):
    """How files are read; null where it is found."""

    model_config = ConfigDict(extra="forbid", strict=True)

    encoding: Annotated[str, Field(min_length=1)] | None
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None
    quote: Annotated[str, Field(min_length=1, max_length=1)] | None
    escape: Annotated[str, Field(min_length=1, max_length=1)] | None
    records: Annotated[str, Field(min_length=1)] | None
    documents: Literal["file", "blank_lines"]
    max_characters: Count | None
    max_record_characters: Count


Split = Literal["train", "validation", "test"]
Column = str | Annotated[list[str], Field(min_length=1)]


class Source(BaseModel):
    """Where records come from, and their shape. A path with a / is a data set on the Hub."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: Annotated[str, Field(pattern=r"^(embedded|json|csv|parquet|text|[\w.-]+/[\w.-]+)$")]
    name: str | None
    revision: str | None
    split: str | Annotated[dict[Split, str], Field(min_length=1)] | None
    data_files: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[dict[Split, str | list[str]], Field(min_length=1)]
        | None
    )
    shape: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer",
        "text", "oasst", "columns",
    ]  # fmt: skip
    columns: (
        dict[
            Literal[
                "messages", "text", "system", "user", "assistant", "reasoning_content", "id", "tools",
            ],
            Column,
        ]
        | None
    )  # fmt: skip
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] | None
    system: str | None
    weight: Annotated[float, Field(gt=0)] | None
    licence: str


class Dataset(Group, Source):
    """`datasets.load_dataset`; the rest says how records are made, measured and refused."""

    mix: list[Source]
    reading: Reading
    max_records: Annotated[int, Field(ge=3)] | None
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    test_fraction: Annotated[float, Field(ge=0, lt=1)] | None
    split_by: Literal["prompt", "cluster"]
    near_duplicate_similarity: Annotated[float, Field(gt=0, le=1)] | None
    seed: Seed
    duplicates: Literal["drop", "keep", "error"]
    leaks: Literal["drop", "keep", "error"]
    leak_budget_fraction: Fraction
    flaws: Flaws
    flaw_budget_fraction: Fraction
    num_train: Count | None
    num_validation: Count | None
    num_test_per_kind: Count | None
    max_length: Annotated[int, Field(ge=8)]
    overflow: Literal["error", "drop", "truncate"]
    overflow_budget_fraction: Fraction


class ChatTemplate(Group):
    path: Annotated[str, Field(min_length=1)]
    train_on: Literal["assistant", "last_assistant", "all"]
    system: Literal["template", "fold", "error"]
    refused: Literal["error", "drop"]
    refused_budget_fraction: Fraction
    allowed_tokens: list[str]
    contrast: str
    date_string: str


class Quantization(Group):
    """`transformers.BitsAndBytesConfig`."""

    load_in_4bit: bool
    load_in_8bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_compute_dtype: Dtype
    bnb_4bit_use_double_quant: bool


class Lora(Group):
    """`peft.LoraConfig`; the adapter that a training starts from is capas' own.

    The first four are null where all weights are trained.
    """

    r: Count | None
    lora_alpha: Annotated[float, Field(gt=0)] | Count | None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None
    target_modules: str | Annotated[list[str], Field(min_length=1)] | None
    bias: Literal["none", "all", "lora_only"]
    use_rslora: bool
    use_dora: bool
    init_lora_weights: Literal[True] | Literal["gaussian", "orthogonal"]
    adapter_name_or_path: Annotated[str, Field(min_length=1)] | None
    adapter_revision: str | None


class Trainer(Group):
    """`transformers.TrainingArguments`; backend and those from packing_length on are capas' own."""

    backend: Literal["transformers", "unsloth"]
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay",
    ]  # fmt: skip
    lr_scheduler_kwargs: dict[str, int | float | str]
    warmup_steps: Annotated[float, Field(ge=0)]
    num_train_epochs: Annotated[float, Field(gt=0)]
    max_steps: Annotated[int, Field(ge=-1)]
    per_device_train_batch_size: Count
    per_device_eval_batch_size: Count
    gradient_accumulation_steps: Count
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(ge=0)]
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor",
        "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_bnb_8bit",
    ]  # fmt: skip
    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    adam_epsilon: Annotated[float, Field(gt=0)]
    bf16: bool
    fp16: bool
    gradient_checkpointing: bool
    use_liger_kernel: bool
    logging_steps: Count
    eval_steps: Count
    save_steps: Count
    save_total_limit: Annotated[
        int, Field(ge=2)
    ]  # the last may be half-written when a run is killed
    load_best_model_at_end: bool
    metric_for_best_model: Literal["loss", "token_accuracy"]
    seed: Seed
    data_seed: Seed
    full_determinism: bool
    packing_length: Annotated[int, Field(ge=8)] | None
    fused_lora: bool
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None
    early_stopping_patience: Count | None
    early_stopping_threshold: Annotated[float, Field(ge=0)]
    divergence_factor: Annotated[float, Field(gt=1)] | None


class Gate(BaseModel):
    """Limits of `capas.evaluation.gate`; None switches a check off."""

    model_config = ConfigDict(extra="forbid", strict=True)

    min_stop_rate: Fraction | None
    max_empty_rate: Fraction | None
    max_control_token_rate: Fraction | None
    max_quantization_loss: Annotated[float, Field(ge=0)] | None


class Harness(BaseModel):
    """Arguments of `lm_eval.simple_evaluate` and of its TaskManager."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tasks: list[Annotated[str, Field(min_length=1)]]
    include_path: Annotated[str, Field(min_length=1)] | None
    num_fewshot: Annotated[int, Field(ge=0)] | None
    limit: Count | None
    apply_chat_template: bool


Metric = BuiltIn | Annotated[str, Field(pattern=OWN_FUNCTION)]


class Evaluation(Group):
    metrics: Literal["auto"] | list[Metric]
    max_records: Count | None
    batch_size: Count
    max_new_tokens: Count | None
    bootstrap_resamples: Annotated[int, Field(ge=100)]
    confidence_fraction: Annotated[float, Field(gt=0.5, lt=1)]
    seed: Seed
    gate: Gate
    harness: Harness


class Decoding(BaseModel):
    """Keys of `transformers.GenerationConfig`, all but the first optional: null stands for not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    do_sample: bool
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Fraction | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _greedy_has_no_sampling_keys(self) -> "Decoding":
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        useless = given - {"do_sample", "repetition_penalty"}
        if not self.do_sample and useless:
            raise ValueError(f"{', '.join(sorted(useless))} only where do_sample is true")
        return self


class Generation(Group):
    prompts: str | Annotated[list[str], Field(min_length=1)] | None
    system: str | None
    num_prompts: Count
    num_return_sequences: Count
    max_new_tokens: Count | None
    seed: Seed
    wrong_chat_template: str | None
    settings: Annotated[dict[str, Decoding], Field(min_length=1)]


class Tracking(Group):
    enabled: bool
    experiment_name: Annotated[str, Field(min_length=1)]


class Experiment(Group):
    """An overlay over several groups; it has no values of its own."""


class Config(BaseModel):
    """params.yaml as a whole."""

    model_config = ConfigDict(extra="forbid", strict=True)

    hardware: Hardware
    model: Model
    dataset: Dataset
    chat_template: ChatTemplate
    quantization: Quantization
    lora: Lora
    trainer: Trainer
    evaluation: Evaluation
    generation: Generation
    tracking: Tracking
    experiment: Experiment
    seed: Seed


GROUPS: dict[str, type[Group]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Group)
}


@dataclass(frozen=True)
class Argument:
    """An argument of a learning rate schedule: whether a value is one, and what is expected."""

    holds: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_STEPS = Argument(lambda v: type(v) is int and v >= 0, "a whole number of steps, at least 0")
_SOME_STEPS = Argument(lambda v: type(v) is int and v >= 1, "a whole number of steps, at least 1")
_CYCLES = Argument(lambda v: type(v) is int and v >= 1, "a whole number of restarts, at least 1")
_WAVES = Argument(
    lambda v: _is_number(v) and v > 0, "a number above 0; 0.5 falls once and stays down"
)
_POWER = Argument(lambda v: _is_number(v) and v > 0, "a number above 0")
_RATE = Argument(
    lambda v: _is_number(v) and v >= 0, "a learning rate of at least 0, below trainer.learning_rate"
)
_RATIO = Argument(
    lambda v: _is_number(v) and 0 <= v < 1,
    "a fraction of trainer.learning_rate, at least 0 and below 1",
)
_RAMP = Argument(lambda v: v in ("linear", "cosine", "1-sqrt"), "linear, cosine or 1-sqrt")
# The arguments of each schedule in transformers.optimization, those that Trainer gives it left out.
SCHEDULES: dict[str, dict[str, Argument]] = {
    "linear": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine": {"num_cycles": _WAVES},
    "cosine_with_restarts": {"num_cycles": _CYCLES},
    "cosine_with_min_lr": {"num_cycles": _WAVES, "min_lr": _RATE, "min_lr_rate": _RATIO},
    "polynomial": {"lr_end": _RATE, "power": _POWER},
    "inverse_sqrt": {"timescale": _SOME_STEPS},
    "warmup_stable_decay": {
        "num_decay_steps": _SOME_STEPS,
        "num_stable_steps": _STEPS,
        "warmup_type": _RAMP,
        "decay_type": _RAMP,
        "min_lr_ratio": _RATIO,
        "num_cycles": _WAVES,
    },
}


def _schedule_problems(kind: str, kwargs: dict[str, Any], learning_rate: float) -> Iterator[str]:
    """A sentence for each argument in trainer.lr_scheduler_kwargs that the schedule cannot take."""
    for name, value in kwargs.items():
        key, argument = f"trainer.lr_scheduler_kwargs.{name}", SCHEDULES[kind].get(name)
        if argument is None:
            yield (
                f"{key}={_show(value)}: lr_scheduler_type={kind} has no such argument; expected keys of that "
                f"schedule: {', '.join(SCHEDULES[kind]) or 'none'} (~{key} on the command line removes it)"
            )
        elif not argument.holds(value) or (argument is _RATE and value >= learning_rate):
            yield f"{key}={_show(value)}: expected {argument.expected} ({kind})"


@dataclass(frozen=True)
class Rule:
    """A condition between keys, tried once each of its keys is valid by itself."""

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    expected: str


def _every(names: tuple[str, ...], holds: Callable[[dict[str, Any]], bool]) -> Callable[..., bool]:
    """Whether a rule holds for the source of `dataset`, whose values are given, and for all of its mix."""
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


_GENERATED = ("name", "revision", "split", "data_files", "columns", "roles", "system")  # all null
# Of every source: (its keys, what must hold of them, what is expected where it does not).
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


# What trainer.backend=unsloth leaves out: of a key the one value that goes with it, and why.
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
        ("trainer.fused_lora", "lora.lora_dropout", "lora.use_dora", "lora.bias"),
        lambda fused, dropout, dora, bias: (
            not fused or (not dropout and not dora and bias == "none")
        ),
        "without lora_dropout, use_dora and trained biases, or trainer.fused_lora=false",
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
        ("lora.bias",),
        lambda bias: bias == "none",
        "none: the model without its adapter would no longer be the base, which the tuned one is compared "
        "with",
    ),
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
        ("trainer.load_best_model_at_end", "trainer.save_steps", "trainer.eval_steps"),
        lambda best, save, evaluate: not best or save == evaluate,
        "save_steps equal to eval_steps: the best checkpoint is one that was evaluated",
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


def validate(values: dict[str, Any], word: Word = lambda key, value: None) -> None:
    """Check everything that conf/ composed to.

    Args:
        word: the text that stands for a value of a key in conf/ or on the command line, where it is known:
            YAML and Hydra read 12e4567 as a number.

    Raises:
        CapasError: all problems at once, one a line: dotted key, value, what is expected, nearest key.
    """
    if problems := find_problems(values, word):
        raise refused(problems)


def find_problems(
    values: dict[str, Any], word: Word, is_doubtful: Callable[[str], bool] = lambda key: False
) -> list[Problem]:
    """Return every problem of the values, see `validate`.

    Args:
        is_doubtful: whether a key may not have the value that the user meant: no rule that reads it is tried.
    """
    problems: dict[str, Problem] = {}
    for problem, part in _field_problems(values, word):
        if before := problems.get(problem.key):
            problem = Problem(before.key, before.value, f"{before.message} or {part}")
        problems[problem.key] = problem

    def valid(keys: tuple[str, ...]) -> list[Any] | None:
        """The values of `keys`; None where one of them is missing, wrong by itself or doubtful."""
        wrong = any(p == key or p.startswith(f"{key}.") for p in of_fields for key in keys)
        wrong = wrong or any(map(is_doubtful, keys))
        found = [_lookup(values, key) for key in keys]
        return None if wrong or any(f is _ABSENT for f in found) else found

    of_fields = list(problems)
    for rule in RULES:
        found = valid(rule.keys)
        if found is not None and not rule.holds(*found):
            given = ", ".join(f"{k}={_show(f)}" for k, f in zip(rule.keys, found, strict=True))
            problems[f"{given} {rule.expected}"] = Problem(
                rule.keys[0], _show(found[0]), f"{given}: expected {rule.expected}"
            )
    if (found := valid(_OF_SCHEDULE)) is not None:
        kwargs = _OF_SCHEDULE[1]
        for text in _schedule_problems(*found):
            problems[text] = Problem(kwargs, _show(found[1]), text)
    for key, text in _secrets(values):
        problems[f"{key} holds a secret"] = Problem(key, "***", text)
    return list(problems.values())


_OF_SCHEDULE = (
    "trainer.lr_scheduler_type",
    "trainer.lr_scheduler_kwargs",
    "trainer.learning_rate",
)
_FREE_TEXT = ("system", "prompts")  # what is said to a model may look like anything


def _secrets(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, sentence) of every text with a password or a token in it."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            if key not in _FREE_TEXT:
                yield from _secrets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, str) and (shown := without_secrets(values)) != values:
        yield (
            path,
            f"{path}={shown!r}: holds a password or a token (***), which params.yaml, MLflow and the card "
            "of the model would show. The Hub reads HF_TOKEN instead, MLflow MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD; download what else is protected into data/own",
        )


PORTABLE_OPTIMIZERS = ("adamw_torch_fused", "sgd")  # they call no vector function of oneMKL


def advice(values: dict[str, Any]) -> list[str]:
    """Return a line for each choice that is allowed and hardly ever meant. The values are valid."""
    lines = [*_untrained_system(values), *steps.advice(values)]
    if values["hardware"]["device"] != "cpu":
        return lines
    if half := [
        f"{key}={_show(value)}"
        for key in ("model.dtype", "trainer.bf16")
        if (value := _lookup(values, key)) not in ("float32", False)
    ]:
        lines.append(
            f"{' and '.join(half)} on a CPU, whose kernels for it are many times "
            "slower than those for float32"
        )
    optim = values["trainer"]["optim"]
    if values["hardware"]["instruction_set"] == "portable" and optim not in PORTABLE_OPTIMIZERS:
        lines.append(
            f"trainer.optim={optim} takes square roots from oneMKL, which rounds them differently on "
            "Intel's and on other CPUs: the bytes repeat on this kind of machine alone, whatever "
            f"hardware.instruction_set=portable says. {' and '.join(PORTABLE_OPTIMIZERS)} do not"
        )
    return lines


# Shapes of records that have no place for a system prompt of their own.
_WITHOUT_SYSTEM = ("question_answer", "text")


def _untrained_system(values: dict[str, Any]) -> Iterator[str]:
    """A line where questions are asked under a system prompt that no record is trained under."""
    asked, dataset = values["generation"]["system"], values["dataset"]
    if asked is None:  # that of a test record
        return
    trained = {source["system"] for source in (dataset, *dataset["mix"])}
    if asked in trained or any(map(_brings_system, (dataset, *dataset["mix"]))):
        return
    shown = " and ".join("none" if t is None else repr(t) for t in sorted(trained, key=str))
    yield (
        f"generation.system={asked!r} is asked with, and no record is trained under it: dataset.system is "
        f"{shown}. Set both to the same text, or generation.system=null, which takes the trained one"
    )


def _brings_system(source: dict[str, Any]) -> bool:
    """Whether records may hold a system prompt of their own, which compose cannot see."""
    if source["path"] == "embedded" or source["shape"] in _WITHOUT_SYSTEM:
        return False
    columns = source["columns"] or {}
    return source["shape"] != "columns" or "system" in columns or "messages" in columns


def _field_problems(values: dict[str, Any], word: Word) -> Iterator[tuple[Problem, str]]:
    """The problem, and pydantic's part of its sentence; a union yields one for each of its members."""
    try:
        Config.model_validate(values)
    except ValidationError as error:
        items = [(_dotted(item["loc"], values), item) for item in error.errors()]
        keys = [key for key, _ in items]
        for key, item in items:
            message = _in_words(item).removeprefix("Value error, ")
            is_scalar = isinstance(item["input"], int | float)
            if item["type"] == "string_type" and is_scalar and keys.count(key) == 1:
                given = word(key, item["input"]) or _show(item["input"])
                yield Problem(key, given, _quoting(key, given, item["input"])), message
                continue
            sentence = explain(key, item["type"], message, item["input"])
            shown = "" if item["type"] in ("missing", "extra_forbidden") else _show(item["input"])
            yield Problem(key, shown, sentence), message[0].lower() + message[1:]


def _quoting(key: str, given: str, value: Any) -> str:
    """How to write a text that YAML and Hydra read as a number or a truth value."""
    kind = "true or false" if isinstance(value, bool) else "a number"
    leaf = key.rpartition(".")[2]
    return (
        f"{key}={given}: expected a text, and {given} is read as {kind}. Quote it: {leaf}: '{given}' in "
        f"conf/, \"{key}='{given}'\" on the command line"
    )


def _in_words(item: Any) -> str:
    if item.get("ctx", {}).get("pattern") == OWN_FUNCTION:
        return "a function of your own, FILE.py:FUNCTION"
    if item["type"] == "list_type" and isinstance(item["input"], str):
        return f"expected a list: [{item['input']}]"
    return str(item["msg"])


def _dotted(location: tuple[int | str, ...], values: dict[str, Any]) -> str:
    """The key in params.yaml; pydantic adds the names of union members to a location."""
    parts: list[str] = []
    node: Any = values
    for part in location:
        inside = isinstance(node, dict) and part in node
        inside = inside or (isinstance(node, list) and isinstance(part, int))
        if inside or not parts or isinstance(node, dict):
            parts.append(str(part))
            node = node[part] if inside else None
    return ".".join(parts)


def explain(
    key: str, kind: str, message: str, value: Any, groups: Mapping[str, type[Group]] = GROUPS
) -> str:
    """Return a problem that pydantic found as a sentence."""
    if kind == "missing":
        return f"{key}: is missing; every option of a group must set it"
    if kind == "extra_forbidden":
        return f"{key}={_show(value)}: no such key{nearest(key, groups)}"
    if (answer := answer_to_value(key, value)) is not None:
        return f"{key}={_show(value)}: no such value; {answer}"
    return f"{key}={_show(value)}: {message[0].lower()}{message[1:]}"


def nearest(key: str, groups: Mapping[str, type[Group]] = GROUPS) -> str:
    """Return the key that was meant, or the keys that there are, to follow `no such key`."""
    if (left := leaves_schema(key, groups)) is None:
        return ""
    path, name, known = left
    if path and not known:
        return f"; {path} is a value and has no keys"
    if (not path or path.partition(".")[0] in GROUPS) and (answer := answer_to_key(name)):
        return answer
    if not path:
        if meant := _nearest_group(key, groups):
            return f"; did you mean {' or '.join(meant)}?"
        return answer_to_key(key.rpartition(".")[2]) or ""
    if path in GROUPS and name not in _GENERAL and (others := _keys_called(name)):
        return f"; did you mean {' or '.join(others)}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    there = f"; {path} has {', '.join(n for n in known if n != 'preset')}"
    return f"; did you mean {path}.{close[0]}?" if close else there


_GENERAL = ("name", "path")  # names of keys that say nothing without their group


def leaves_schema(
    key: str, groups: Mapping[str, type[Group]] = GROUPS
) -> tuple[str, str, list[str]] | None:
    """Return where a dotted key leaves the schema: the path so far, the name, the names that there are.

    None where the schema has the key, or takes any name there.
    """
    parts = key.split(".")
    children: list[tuple[str | None, Any]] = [*groups.items(), ("seed", int)]
    for number, part in enumerate(parts):
        matches = [kind for name, kind in children if name in (part, None)]
        if not matches:
            return ".".join(parts[:number]), part, [name for name, _ in children if name]
        children = [child for kind in matches for child in _children(kind)]
    return None


def _children(annotation: Any) -> Iterator[tuple[str | None, Any]]:
    """Yield name and type of every key below a value; the name None stands for any."""
    arguments = get_args(annotation)
    match get_origin(annotation):
        case kind if kind is Annotated:
            yield from _children(arguments[0])
        case kind if kind in (Union, UnionType):
            for member in arguments:
                yield from _children(member)
        case kind if kind is list:
            yield None, arguments[0]
        case kind if kind is dict:
            literal = get_origin(arguments[0]) is Literal
            for name in get_args(arguments[0]) if literal else (None,):
                yield name, arguments[1]
        case _ if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from ((n, field.annotation) for n, field in annotation.model_fields.items())


def _nearest_group(key: str, groups: Mapping[str, type[Group]]) -> list[str]:
    """Return the groups or keys that were meant by a key whose first part is no group."""
    if "." in key:
        close = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.6)
        return close or _keys_called(key.rpartition(".")[2])
    leaves = {known.rpartition(".")[2] for known in known_keys()}
    if found := _keys_called(key):
        return found
    close = difflib.get_close_matches(key, [*groups, *leaves], n=1, cutoff=0.6)
    return close if close and close[0] in groups else _keys_called(close[0]) if close else []


def _keys_called(leaf: str) -> list[str]:
    """Return the keys with this last part, three at most."""
    return [key for key in known_keys() if key.rpartition(".")[2] == leaf][:3]


def known_keys() -> list[str]:
    """All dotted keys of the schema, groups' leaves included."""
    leaves = {name: dict.fromkeys(group.model_fields) for name, group in GROUPS.items()}
    return [*flatten(leaves), "seed"]


_ABSENT = object()


def _lookup(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            return _ABSENT
        values = values[part]
    return values


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def group_schema(name: str) -> dict[str, Any]:
    """JSON Schema of a file in conf/<name>/, for completion in editors.

    Nothing is required in it: a file may leave keys to the `_base` of its group.
    """
    schema = GROUPS[name].model_json_schema()
    schema.pop("required", None)
    schema["properties"]["defaults"] = {"type": "array", "description": "Hydra defaults list"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
