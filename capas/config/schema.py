"""Define the schema of params.yaml: every key, its type and range; `rules` has the conditions between keys.

Among the stages only compose imports it, so a new key reruns no stage but those that declare it. It has no
defaults: values live in conf/ only. There is one class per group; the class, the folder in conf/ and the key
in params.yaml have the same name.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from capas.evaluation.names import OWN_FUNCTION, BuiltIn, OfAnswers, OfTokens

Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Dtype = Literal["float32", "bfloat16", "float16"]
OwnMetric = Annotated[str, Field(pattern=OWN_FUNCTION)]
Metric = BuiltIn | OwnMetric
InstructionSet = Literal["portable", "native", "avx2", "avx512"]


class Group(BaseModel):
    """A group of conf/. `preset` is the stem of the chosen file, so that the choice can be read back."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    preset: str


class Hardware(Group):
    """The device, its threads and the processes.

    num_processes and num_machines are those of `accelerate launch`; dtype is the default of model.dtype.
    num_threads: null takes as many threads as there are physical cores.
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
    """Arguments of `AutoModelForCausalLM.from_pretrained`; pad_token, licence and cpu_* are capas' own."""

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
    """The policy for each kind of flaw of a record; null stands for the policy of `malformed`."""

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
    """The format of files; encoding, separator, quote, escape and records are detected if null."""

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
    """A source of records, and their shape. A path with a / is a data set on the Hub."""

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
    """Arguments of `datasets.load_dataset`, and how records are made, split, measured and refused."""

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
    """Arguments of `transformers.BitsAndBytesConfig`."""

    load_in_4bit: bool
    load_in_8bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_compute_dtype: Dtype
    bnb_4bit_use_double_quant: bool


class Lora(Group):
    """Arguments of `peft.LoraConfig`; adapter_name_or_path and adapter_revision are capas' own.

    The first four are null if all weights are trained. The adapter is the one that a training starts from.
    """

    r: Count | None
    lora_alpha: Annotated[float, Field(gt=0)] | Count | None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None
    target_modules: str | Annotated[list[str], Field(min_length=1)] | None
    use_rslora: bool
    use_dora: bool
    init_lora_weights: Literal[True] | Literal["gaussian", "orthogonal"]
    adapter_name_or_path: Annotated[str, Field(min_length=1)] | None
    adapter_revision: str | None


class Trainer(Group):
    """Arguments of `transformers.TrainingArguments`.

    backend, metric_records, metric_max_new_tokens and the keys from packing_length on are capas' own, and so
    are most values of metric_for_best_model.
    """

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
    # the last checkpoint may be half-written when a run is killed
    save_total_limit: Annotated[int, Field(ge=2)]
    load_best_model_at_end: bool
    # labels are compared after the training alone
    metric_for_best_model: OfTokens | OfAnswers | OwnMetric
    metric_records: Count | None
    metric_max_new_tokens: Count | None
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
    """Limits of `capas.evaluation.gate`; null turns a check off."""

    model_config = ConfigDict(extra="forbid", strict=True)

    min_stop_rate: Fraction | None
    max_empty_rate: Fraction | None
    max_control_token_rate: Fraction | None
    min_length_ratio: Annotated[float, Field(ge=0)] | None
    max_length_ratio: Annotated[float, Field(gt=0)] | None
    min_gain_to_noise: Annotated[float, Field(ge=0)] | None
    max_forgetting: Annotated[float, Field(ge=0)] | None
    max_quantization_loss: Annotated[float, Field(ge=0)] | None


class Harness(BaseModel):
    """Arguments of `lm_eval.simple_evaluate` and of its TaskManager."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tasks: list[Annotated[str, Field(min_length=1)]]
    include_path: Annotated[str, Field(min_length=1)] | None
    num_fewshot: Annotated[int, Field(ge=0)] | None
    limit: Count | None
    apply_chat_template: bool


class Evaluation(Group):
    metrics: Literal["auto"] | list[Metric]
    labels: Annotated[list[str], Field(min_length=2)] | None
    max_records: Count | None
    batch_size: Count
    max_new_tokens: Count | None
    bootstrap_resamples: Annotated[int, Field(ge=100)]
    confidence_fraction: Annotated[float, Field(gt=0.5, lt=1)]
    noise_records: Count | None
    seed: Seed
    gate: Gate
    harness: Harness


class Decoding(BaseModel):
    """Keys of `transformers.GenerationConfig`, all but the first optional: null means not given."""

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
    """An overlay over several groups, without values of its own."""


class Config(BaseModel):
    """The whole content of params.yaml."""

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
