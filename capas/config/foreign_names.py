"""List the names of other libraries for keys, options and values: Trainer, PEFT, TRL, Unsloth, axolotl.

Used to answer an unknown name: `max_seq_length: no such key; did you mean dataset.max_length?`
"""

_OFFLOAD = (
    "offloading to the CPU or to disk is not supported: all weights stay on one device. For a model that is "
    "too large: quantization=nf4, a smaller dataset.max_length, trainer.gradient_checkpointing=true, or "
    "hardware=gpu_fsdp2 with quantization=none, which divides the model among GPUs"
)
_QUANTIZATION = "choose quantization=nf4, quantization=int8 or quantization=none"
_SAMPLING = "decoding is set by name, as in generation.settings.low_temperature.{}"
_WHOLE = "choose lora=all_linear or lora=attention; lora=none trains all weights"
_DISTRIBUTED = "choose hardware=gpu_ddp, or hardware=gpu_fsdp2 with quantization=none"
_PLACES = "the places are fixed: data/models/adapter and reports/"
_LOGIN = "run `hf auth login`, or set HF_TOKEN in the environment"
_TRACKING = "runs are tracked in MLflow; tracking=none switches it off"
_WORKERS = "the number of processes is chosen by the machine's cores"
_SFT = "supervised fine-tuning is the only kind of training here"

# Name of a key in another library -> key in conf/.
KEYS = {
    # trainer
    **dict.fromkeys(("lr", "learning_rate_max"), "trainer.learning_rate"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "trainer.lr_scheduler_type"),
    "warmup_ratio": "trainer.warmup_steps",  # a value below 1 is a fraction
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), "trainer.num_train_epochs"),
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "train_batch_size", "per_gpu_train_batch_size"),
        "trainer.per_device_train_batch_size",
    ),
    **dict.fromkeys(
        ("eval_batch_size", "per_gpu_eval_batch_size"), "trainer.per_device_eval_batch_size"
    ),
    **dict.fromkeys(
        ("grad_accum", "gradient_accumulation", "accumulate_grad_batches"),
        "trainer.gradient_accumulation_steps",
    ),
    **dict.fromkeys(
        ("gradient_clipping", "gradient_clip_val", "clip_grad"), "trainer.max_grad_norm"
    ),
    "optimizer": "trainer.optim",
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "evals_per_epoch", "do_eval"), "trainer.eval_steps"
    ),
    **dict.fromkeys(("save_strategy", "saves_per_epoch"), "trainer.save_steps"),
    "logging_strategy": "trainer.logging_steps",
    "early_stopping": "trainer.early_stopping_patience",
    **dict.fromkeys(("packing", "sample_packing", "eval_packing"), "trainer.packing_length"),
    "use_liger": "trainer.use_liger_kernel",
    "use_unsloth": "trainer.backend",
    **dict.fromkeys(("random_state", "random_seed", "manual_seed"), "seed"),
    # dataset, chat_template
    **dict.fromkeys(
        (
            *("max_seq_length", "max_seq_len", "sequence_len", "seq_length", "seq_len"),
            *("cutoff_len", "model_max_length", "block_size", "context_length"),
        ),
        "dataset.max_length",
    ),
    **dict.fromkeys(("dataset_name", "dataset_path", "dataset_name_or_path"), "dataset.path"),
    **dict.fromkeys(("train_file", "validation_file", "data_path"), "dataset.data_files"),
    **dict.fromkeys(("dataset_text_field", "text_column", "field_messages"), "dataset.columns"),
    **dict.fromkeys(("max_samples", "max_train_samples"), "dataset.max_records"),
    **dict.fromkeys(("val_set_size", "validation_split"), "dataset.validation_fraction"),
    **dict.fromkeys(("test_size", "test_split"), "dataset.test_fraction"),
    **dict.fromkeys(("system_prompt", "default_system"), "dataset.system"),
    **dict.fromkeys(("chat_template_path", "chat_template_jinja"), "chat_template.path"),
    **dict.fromkeys(
        (
            *("assistant_only_loss", "completion_only_loss", "train_on_inputs", "train_on_prompt"),
            *("train_on_responses_only", "roles_to_train"),
        ),
        "chat_template.train_on",
    ),
    # lora, quantization
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "lora.r"),
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    **dict.fromkeys(
        ("lora_target", "lora_target_modules", "lora_target_linear"), "lora.target_modules"
    ),
    **dict.fromkeys(
        ("lora_model_dir", "adapter_path", "peft_model_id"), "lora.adapter_name_or_path"
    ),
    "use_4bit": "quantization.load_in_4bit",
    "use_8bit": "quantization.load_in_8bit",
    "use_nested_quant": "quantization.bnb_4bit_use_double_quant",
    # model, hardware, generation
    **dict.fromkeys(
        ("model_name", "base_model", "model_id", "pretrained_model_name_or_path"),
        "model.model_name_or_path",
    ),
    "torch_dtype": "model.dtype",
    **dict.fromkeys(
        (
            *("flash_attention", "flash_attn", "use_flash_attention_2", "flash_attention_2"),
            *("sdp_attention", "eager_attention", "xformers_attention"),
        ),
        "model.attn_implementation",
    ),
    **dict.fromkeys(("use_cpu", "no_cuda"), "hardware.device"),
    "tf32": "hardware.allow_tf32",
    **dict.fromkeys(("gpus", "num_gpus", "n_gpu", "nproc_per_node"), "hardware.num_processes"),
    **dict.fromkeys(("num_nodes", "nnodes"), "hardware.num_machines"),
    **dict.fromkeys(("max_tokens", "max_gen_length"), "generation.max_new_tokens"),
    "num_samples": "generation.num_return_sequences",
}
# Name of a key in another library -> advice, if no key in conf/ does the same.
ANSWERS = {
    **dict.fromkeys(
        (
            *("device_map", "max_memory", "offload", "cpu_offload", "offload_folder"),
            *("offload_state_dict", "offload_buffers", "offload_dir", "offload_index"),
            *("offload_embedding", "offload_optimizer", "offload_param", "fsdp_offload_params"),
            *("activation_offloading", "llm_int8_enable_fp32_cpu_offload"),
        ),
        _OFFLOAD,
    ),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "ddp", "fsdp_version"), _DISTRIBUTED),
    **{
        name: _SAMPLING.format(f"{name}={value}")
        for name, value in {
            "temperature": "0.7",
            "top_k": "50",
            "top_p": "0.9",
            "min_p": "0.05",
            "typical_p": "0.9",
            "repetition_penalty": "1.1",
            "do_sample": "true",
        }.items()
    },
    **dict.fromkeys(
        ("bias", "lora_bias"),
        "biases are not trained: the model without its adapter would no longer be the base that it is "
        "compared with",
    ),
    "num_beams": "there is no beam search; generation.settings sample, or decode greedily",
    "group_by_length": "write trainer.train_sampling_strategy=group_by_length",
    **dict.fromkeys(("finetuning_type", "full_finetuning", "adapter", "use_peft"), _WHOLE),
    **dict.fromkeys(
        ("modules_to_save", "lora_modules_to_save"),
        "embeddings, norms and head stay as they are; lora.target_modules names linear layers",
    ),
    "task_type": "it is always CAUSAL_LM",
    **dict.fromkeys(("quantization_bit", "quantization_config"), _QUANTIZATION),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_name", "tokenizer_name_or_path"),
        "the tokenizer comes with the model: model.model_name_or_path",
    ),
    **dict.fromkeys(
        ("output_dir", "overwrite_output_dir", "logging_dir", "dataset_prepared_path"), _PLACES
    ),
    "run_name": "a run is named by what differs from conf/; name an experiment with dvc exp run --name NAME",
    **dict.fromkeys(
        ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
        "training goes on from its last checkpoint by itself",
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
        "upload the finished adapter with capas push OWNER/NAME",
    ),
    **dict.fromkeys(("token", "hf_token", "hub_token", "use_auth_token"), _LOGIN),
    **dict.fromkeys(("report_to", "wandb_project", "wandb_entity", "use_wandb"), _TRACKING),
    "mlflow_tracking_uri": "set MLFLOW_TRACKING_URI in the environment",
    **dict.fromkeys(
        ("dataset_num_proc", "dataloader_num_workers", "preprocessing_num_workers"), _WORKERS
    ),
    **dict.fromkeys(("stage", "rl"), _SFT),
}
# Unknown option -> options that do the same.
OPTIONS = {
    **dict.fromkeys(
        (("quantization", n) for n in ("4bit", "int4", "bnb_4bit", "qlora")), "quantization=nf4"
    ),
    **dict.fromkeys((("quantization", n) for n in ("8bit", "bnb_8bit")), "quantization=int8"),
    ("lora", "qlora"): "trainer=qlora with quantization=nf4",
    ("lora", "full"): "lora=none with trainer=full and quantization=none",
    ("lora", "lora"): "lora=all_linear",
    ("trainer", "sgd"): "trainer.optim=sgd",
    ("trainer", "lora"): "lora=all_linear",
    **dict.fromkeys((("hardware", n) for n in ("cuda", "auto")), "hardware=gpu"),
    **dict.fromkeys((("hardware", n) for n in ("ddp", "multi_gpu")), "hardware=gpu_ddp"),
    **dict.fromkeys(
        (("hardware", n) for n in ("fsdp", "fsdp2", "deepspeed")), "hardware=gpu_fsdp2"
    ),
}
_ADAM = (
    "Adam is AdamW without weight decay: "
    "write trainer.optim=adamw_torch_fused trainer.weight_decay=0"
)
_DTYPES = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "float", "torch.float32"), "float32"),
}
# Key -> {value that it does not accept: advice}.
VALUES: dict[str, dict[str, str]] = {
    "trainer.optim": {
        "adam": _ADAM,
        "adamw": "write trainer.optim=adamw_torch_fused",
        "adamw_hf": "write trainer.optim=adamw_torch",
        "adam_8bit": "write trainer.optim=adamw_8bit trainer.weight_decay=0",
        "paged_adam_8bit": "write trainer.optim=paged_adamw_8bit trainer.weight_decay=0",
    },
    **{
        key: {theirs: f"write {key}={ours}" for theirs, ours in _DTYPES.items()}
        for key in ("model.dtype", "hardware.dtype", "quantization.bnb_4bit_compute_dtype")
    },
    "trainer.metric_for_best_model": {
        "eval_loss": "write trainer.metric_for_best_model=loss",
        "accuracy": "write trainer.metric_for_best_model=token_accuracy, or exact_match of generated answers",
        "label_accuracy": "labels are compared after the training alone: write loss, or exact_match of "
        "generated answers",
    },
    "hardware.device": {
        **dict.fromkeys(("gpu", "cuda:0", "auto"), "choose hardware=gpu, or hardware=cpu"),
        "mps": "Apple's GPUs are not supported; choose hardware=cpu",
    },
    "model.attn_implementation": dict.fromkeys(
        ("flash_attention", "flash_attn", "fa2", "flash"),
        "write model.attn_implementation=flash_attention_2",
    ),
}


def answer_to_key(name: str) -> str | None:
    """Return the text after `no such key` if another library has a key of that name, otherwise None."""
    if name in KEYS:
        return f"; did you mean {KEYS[name]}?"
    return f"; {ANSWERS[name]}" if name in ANSWERS else None


def answer_to_value(key: str, value: object) -> str | None:
    """Return advice on a value that another library accepts for that key; case is ignored."""
    return VALUES.get(key, {}).get(value.lower()) if isinstance(value, str) else None
