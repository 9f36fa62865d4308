"""Train LoRA layers on the frozen, quantized base; or, with lora=none, all weights of one in full precision.

Reads   data/formatted (train, validation), data/models/quantized, data/models/tokenizer;
        data/models/initial_adapter, whose weights are the first ones where it holds an adapter
Writes  data/models/adapter (a whole model, where all weights are trained), reports/train.json,
        reports/history.csv, reports/validation.csv,
        reports/certificate.json (what was checked of the result, and what it was made from)
Params  hardware, lora, model, trainer

The travelling record is a row of ids; only labels other than -100 carry loss:

    input_ids  <|im_start|> assistant \\n   {"name": "set_timer", "arguments": ...} <|im_end|> \\n
    labels             -100      -100 -100  {"name": "set_timer", "arguments": ...} <|im_end|> -100

Before, the model goes on as in pretraining ("Okay, 99 minutes from now."); afterwards, with the call.
"""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core import extras
from capas.core.dag import recorded
from capas.core.errors import CapasError
from capas.core.files import read_json, write_csv, write_json
from capas.core.params import Params
from capas.core.stage import Stage, log
from capas.models import adapter, hardware, tuned_weights
from capas.models.vocabulary import check_ids
from capas.training import launch, live_rows, steps, unsloth

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments

    from capas.training.batches import Collator, Example
    from capas.training.exact_trainer import Trainer

FORMATTED, QUANTIZED, TOKENIZER = "data/formatted", "data/models/quantized", "data/models/tokenizer"
OWN = (  # no arguments of transformers.Trainer
    "backend",
    *("packing_length", "fused_lora", "loraplus_lr_ratio", "save_total_limit"),
    *("early_stopping_patience", "early_stopping_threshold", "divergence_factor"),
)
HISTORY = ("step", "epoch", "loss", "learning_rate", "grad_norm")
HEADLINE = ("num_steps", "train_loss", "validation_loss", "validation_token_accuracy")
VALIDATION = ("step", "epoch", "loss", "token_accuracy")


def main(params: Params, stage: Stage) -> None:
    # before torch, and Unsloth before transformers, is imported
    device = hardware.prepare(params.hardware, params.hardware.num_processes)
    if params.trainer.backend == "unsloth":
        unsloth.prepare(stage.root)
    initial = initial_adapter(params.lora, stage)
    follows = launch.is_main() and not stage.debug
    check_tracker = live_rows.start_check(stage.root, enabled=follows)
    from capas.training import capacity, certificate, exact_trainer, fused, lora, used_settings
    from capas.training.batches import Collator, read_examples, tails
    from capas.training.packing import pack

    chat = read_json(stage.dep(FORMATTED) / "chat.json")
    train = read_examples(stage.dep(FORMATTED) / "train.parquet")
    validation = read_examples(stage.dep(FORMATTED) / "validation.parquet")
    flatten = params.model.attn_implementation == "flash_attention_2"
    collator = Collator(chat["pad_token_id"], flatten)
    packed = params.trainer.packing_length
    rows = train if packed is None else pack(train, packed)
    check_memory(num_tokens(rows), num_tokens(validation), params, device, stage)
    lengths = num_tokens([*train, *validation])
    check_lengths(stage.dep(QUANTIZED), lengths, params.model.trust_remote_code)
    check_tokens([*train, *validation], chat, stage)
    base = load_base(params, max(lengths), device, stage)
    model = unfreeze(base) if lora.trains_all(params.lora) else add_lora(base, params, initial)
    base_sha256 = certificate.fingerprint(model)
    packing = prove_packing(model, train, rows, collator, params.trainer)
    if params.trainer.fused_lora:
        fused.fuse(model)
    gradient_check = used_settings.check_gradients(model, collator(tails(validation[:2])))

    checkpoints = stage.checkpoints()
    args = training_arguments(params, checkpoints)
    with args.main_process_first(local=False):  # which removes what is half-written
        checkpoint = exact_trainer.last_checkpoint(checkpoints, resume=not stage.debug)
    args.eval_on_start = checkpoint is None  # the curve begins with the base
    trainer = make_trainer(model, args, rows, validation, collator, params)
    check_tracker()
    with live_rows.tracker(stage.root, stage.key(), enabled=follows) as log_rows:
        trainer.add_callback(exact_trainer.LiveRows(log_rows.append))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    weights = None if lora.trains_all(params.lora) else lora.whole_weights(trainer.model)
    if launch.is_main():
        used = used_settings.describe(trainer)
        checked = {"packing": packing, "used": used, "gradient_check": gradient_check}
        write_reports(trainer, steps.Step.of(params.trainer, params.hardware), checked, stage)
        save_tuned(trainer.model, weights, params, chat, stage)
    folder = exact_trainer.told_by_main(launch.is_main() and stage.out("data/models/adapter"))
    probes = collator(tails(validation[:4]))
    if weights is None:
        whole = release(trainer)
        load = partial(load_plain, folder, params, device)
        checks = certificate.check_whole(whole, folder, probes, base_sha256, load)
    else:
        checks = certificate.check_adapter(trainer.model, folder, probes, base_sha256, initial)
    if launch.is_main():
        write_certificate(folder, checks, params, stage)
        stage.costs |= capacity.device_costs(device) | hardware.machine()


def initial_adapter(lora: Params, stage: Stage) -> Path | None:
    """The folder of the adapter that the training starts from.

    Raises:
        CapasError: the lora group contradicts it, or another one is there than it names.
    """
    folder = stage.dep(adapter.FOLDER)
    adapter.check_origin(folder, lora.without())
    if lora.adapter_name_or_path is None:
        return None
    config = read_json(folder / adapter.CONFIG)
    adapter.check_agreement(config, lora.without(), lora.adapter_name_or_path)
    return folder


def check_memory(
    train: list[int], validation: list[int], params: Params, device: "torch.device", stage: Stage
) -> None:
    """Before any weight is read: whether the training fits. The estimate goes beside the measured peak.

    Args:
        train, validation: tokens of the rows that batches are made of.

    Raises:
        CapasError: it needs more memory than there is.
    """
    from capas.training import capacity, memory

    workload = memory.Workload.of(params.trainer, params.hardware, train, validation)
    groups = params.model, params.lora, params.trainer
    try:
        found = memory.estimate(stage.dep(QUANTIZED), *groups, workload)
    except memory.EstimateError as error:
        log.warning("%s", error)
        return
    num_sharing = capacity.num_sharing(params.hardware)
    used, free = capacity.used_bytes(device), capacity.free_bytes(device) // num_sharing
    ways = memory.ways_out(found, workload, params.trainer)
    if num_sharing > 1:
        log.info("%d processes share the memory. Each needs:", num_sharing)
        ways.append(f"hardware.num_processes below {workload.num_processes}")
    log.info("%s", memory.summary(found, used, free))
    memory.check(found, used, free, ways)
    stage.costs |= memory.costs(found, used)


def load_base(
    params: Params, max_length: int, device: "torch.device", stage: Stage
) -> "PreTrainedModel":
    """As the backend loads it, for records of up to `max_length` tokens."""
    folder = stage.dep(QUANTIZED)
    if params.trainer.backend == "unsloth":
        return unsloth.load_base(folder, stage.dep(TOKENIZER), params.model, max_length, device)
    return load_plain(folder, params, device)


def load_plain(folder: Path, params: Params, device: "torch.device") -> "PreTrainedModel":
    """Of a model that will be divided, the parts go to the GPUs later, one by one.

    Raises:
        CapasError: it comes quantized, and should be divided.
    """
    import torch

    from capas.models.loading import load_model, quantization_method

    if params.hardware.distributed_type == "ddp":
        return load_model(folder, params.model, device)
    base = load_model(folder, params.model, torch.device("cpu"))
    if (method := quantization_method(base)) != "none":
        raise CapasError(
            f"hardware.distributed_type=fsdp2 cannot shard {params.model.model_name_or_path}, whose "
            f"weights are {method}. Choose ddp, or a model that is not quantized"
        )
    return base


def unfreeze(base: "PreTrainedModel") -> "PreTrainedModel":
    """The base, all of whose weights are trained."""
    import torch

    base.requires_grad_(True)
    if base.dtype == torch.bfloat16:
        log.warning(
            "the weights are bfloat16 (8 bits of precision): updates smaller than 1/256 of a "
            "weight are lost. To keep them, set model.dtype=float32 and trainer.bf16=true"
        )
    return base


def release(trainer: "Trainer") -> Any:
    """The trained model outside of mixed precision; gradients and optimizer go: their memory is needed."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.zero_grad()
    return model


def add_lora(base: "PreTrainedModel", params: Params, initial: Path | None = None) -> Any:
    """The base, frozen, with LoRA layers: B is zero, so that at first they change nothing.

    Its norms, embeddings and head keep their type, which is what the tuned model will be used with; PEFT's
    `prepare_model_for_kbit_training` makes them float32. Of float16 the range is too small for that.

    Args:
        initial: of an adapter, whose weights they begin with instead.
    """
    from capas.training import lora

    lora.check_target_modules(base, params.lora.target_modules)
    add = unsloth.add_lora if params.trainer.backend == "unsloth" else add_with_peft
    model = add(base, params)
    lora.check_untied(model)
    if initial is not None:
        lora.load_initial(model, initial, params.model.model_name_or_path)
    return model


def add_with_peft(base: "PreTrainedModel", params: Params) -> Any:
    """Raises CapasError: PEFT refuses the lora group."""
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import set_seed

    from capas.models.loading import quantization_method
    from capas.training import lora

    if quantization_method(base) != "none" and base.dtype == torch.float16:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    set_seed(params.trainer.seed)  # A is drawn at random
    try:
        return get_peft_model(base, lora.make_config(params.lora))
    except ValueError as error:
        raise CapasError(f"PEFT rejects the lora group: {error}") from None


def check_tokens(examples: list[Any], chat: dict[str, Any], stage: Stage) -> None:
    """Raises CapasError: the model has no row for a token of the records, for padding or for an end."""
    told = (example["input_ids"] for example in examples)
    others = (chat["pad_token_id"], *chat["stop_token_ids"])
    check_ids(told, others, stage.dep(QUANTIZED), stage.dep(TOKENIZER))


def check_lengths(folder: Path, lengths: list[int], trust_remote_code: bool) -> None:
    """Raises CapasError: a record is longer than what the model in `folder` was made for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max(lengths) > limit:
        raise CapasError(
            f"the longest record has {max(lengths)} tokens, but the model's context is {limit} "
            f"tokens. Set dataset.max_length={limit}, with dataset.overflow=drop or truncate"
        )


def num_tokens(examples: list["Example"]) -> list[int]:
    return [len(example["input_ids"]) for example in examples]


def prove_packing(
    model: Any,
    train: list["Example"],
    rows: list["Example"],
    collator: "Collator",
    trainer: Params,
) -> dict[str, Any] | None:
    """What packing made of the records; None where a row is a record.

    Raises:
        CapasError: packed records would see each other.
    """
    if trainer.packing_length is None:
        return None
    from capas.training.packing import check_isolation

    log.info("%d records in %d rows of %d tokens", len(train), len(rows), trainer.packing_length)
    num_rows = min(2, trainer.per_device_train_batch_size)
    return {
        "num_records": len(train),
        "num_rows": len(rows),
        "filled_fraction": sum(num_tokens(train)) / (len(rows) * trainer.packing_length),
        "isolation_difference": check_isolation(model, train, rows, collator, num_rows),
    }


def make_trainer(
    model: Any,
    args: "TrainingArguments",
    rows: list["Example"],
    validation: list["Example"],
    collator: "Collator",
    params: Params,
) -> "Trainer":
    """It checks at its first step that it computes with what `params` asks for."""
    from capas.training import exact_trainer, schedule, used_settings

    trainer = exact_trainer.Trainer(
        save_total_limit=params.trainer.save_total_limit,
        divergence_factor=params.trainer.divergence_factor,
        loraplus_lr_ratio=params.trainer.loraplus_lr_ratio,
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collator,
        preprocess_logits_for_metrics=exact_trainer.score_batch,
        compute_metrics=exact_trainer.summarize,
    )
    if params.trainer.early_stopping_patience:
        trainer.add_callback(early_stopping(params.trainer))

    def check() -> None:
        used_settings.check_trainer(trainer, params)
        schedule.check_schedule(trainer)
        step = steps.Step.of(params.trainer, params.hardware)
        in_epoch, in_all = step.num_in_epoch(len(rows)), trainer.state.max_steps
        log.info("%s; %d steps per epoch, %d in total", step, in_epoch, in_all)

    trainer.check_at_start(check)
    return trainer


def early_stopping(trainer: Params) -> Any:
    from capas.training.exact_trainer import EarlyStopping

    metric, patience = trainer.metric_for_best_model, trainer.early_stopping_patience
    return EarlyStopping(metric, patience, trainer.early_stopping_threshold)


def training_arguments(params: Params, folder: Path) -> "TrainingArguments":
    """The trainer group as it is, and what follows from the stage.

    Raises:
        CapasError: what transformers refuses, e.g. bf16 on a GPU that has none.
    """
    from transformers import TrainingArguments

    on_cpu, given = params.hardware.device == "cpu", params.trainer.without("preset", *OWN)
    if params.trainer.use_liger_kernel:
        extras.require("gpu", "trainer.use_liger_kernel=true")
    if params.trainer.backend == "unsloth":
        given["gradient_checkpointing"] = False  # the model has Unsloth's own
    divided = params.hardware.distributed_type == "fsdp2"
    try:
        return TrainingArguments(
            fsdp=divided or None,
            fsdp_config={"version": 2} if divided else None,
            **given,
            output_dir=str(folder),
            use_cpu=on_cpu,
            eval_strategy="steps",
            save_strategy="steps",
            logging_nan_inf_filter=False,  # Trainer would log the mean of earlier losses instead of NaN
            gradient_checkpointing_kwargs={"use_reentrant": False},
            remove_unused_columns=False,
            dataloader_pin_memory=not on_cpu,
            # DDP then keeps its buckets: sums of three and more depend on them, also after a resumption.
            ddp_find_unused_parameters=True,
            report_to="none",  # see capas/training/live_rows.py
            disable_tqdm=True,  # see capas.training.exact_trainer.Progress
        )
    except (ValueError, ImportError) as error:
        raise CapasError(f"transformers rejects the trainer group: {error}") from None


def write_reports(
    trainer: "Trainer", step: steps.Step, checked: dict[str, Any], stage: Stage
) -> None:
    facts = {"train_key": stage.key(), **summary(trainer, step), **checked}
    write_json(stage.out("reports/train.json"), facts)
    write_json(stage.out("reports/metrics/train.json"), {name: facts[name] for name in HEADLINE})
    write_curves(trainer.state.log_history, stage)


def summary(trainer: "Trainer", step: steps.Step) -> dict[str, Any]:
    """reports/train.json, without seconds: they differ from run to run."""
    state, history = trainer.state, trainer.state.log_history
    num_trainable, num_parameters = count_parameters(trainer.model)
    rows = [row for row in history if "eval_loss" in row]
    last = rows[-1]
    kept = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    chosen = next(row for row in rows if row["step"] == kept)
    return {
        "num_steps": state.global_step,
        "global_batch_size": step.num_rows,
        "kept_step": kept,  # whose weights the adapter has
        "num_epochs": state.epoch,
        "num_train_tokens": last["num_tokens"],
        "num_supervised_tokens": last["num_supervised_tokens"],
        "num_trainable_parameters": num_trainable,
        "num_parameters": num_parameters,
        "train_loss": mean_loss(history),
        "validation_loss": chosen["eval_loss"],
        "validation_token_accuracy": chosen["eval_token_accuracy"],
        "learning_rate": trainer.args.learning_rate,
    }


def count_parameters(model: Any) -> tuple[int, int]:
    """Those that are trained, and all; tied ones count once."""
    if hasattr(model, "get_nb_trainable_parameters"):
        found: tuple[int, int] = model.get_nb_trainable_parameters()
        return found
    return model.num_parameters(only_trainable=True), model.num_parameters()


def mean_loss(history: list[dict[str, Any]]) -> float:
    """Over all steps; a row's loss is the mean since the row before."""
    rows = [row for row in history if "loss" in row]
    steps = [
        row["step"] - before
        for row, before in zip(rows, [0, *(r["step"] for r in rows)], strict=False)
    ]
    return sum(row["loss"] * n for row, n in zip(rows, steps, strict=True)) / sum(steps)


def write_curves(history: list[dict[str, Any]], stage: Stage) -> None:
    write_csv(stage.out("reports/history.csv"), HISTORY, [row for row in history if "loss" in row])
    validation = [
        {
            "step": r["step"],
            "epoch": r["epoch"],
            "loss": r["eval_loss"],
            "token_accuracy": r["eval_token_accuracy"],
        }
        for r in history
        if "eval_loss" in r
    ]
    write_csv(stage.out("reports/validation.csv"), VALIDATION, validation)


def save_tuned(
    model: Any,
    weights: dict[str, "torch.Tensor"] | None,
    params: Params,
    chat: dict[str, Any],
    stage: Stage,
) -> None:
    """A folder that PEFT, transformers and servers load: weights, tokenizer, template, end tokens.

    Args:
        weights: of `lora.whole_weights`; None: all weights were trained.
    """
    from transformers import GenerationConfig

    folder = stage.out("data/models/adapter")
    if weights is None:
        save_whole(model, folder, stage)
    else:
        save_adapter(model, weights, folder, params)
    for file in sorted(stage.dep(TOKENIZER).iterdir()):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(stage.dep(FORMATTED) / "chat_template.jinja", folder / "chat_template.jinja")
    GenerationConfig(
        bos_token_id=chat["bos_token_id"],
        eos_token_id=chat["stop_token_ids"],
        pad_token_id=chat["pad_token_id"],
    ).save_pretrained(folder)


def save_adapter(
    model: Any, weights: dict[str, "torch.Tensor"], folder: Path, params: Params
) -> None:
    config = model.peft_config["default"]
    config.base_model_name_or_path = params.model.model_name_or_path
    config.revision = commit_of(params.model.revision)
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
    (folder / "README.md").unlink()  # a model card that PEFT fills with guesses
    sort_target_modules(folder / "adapter_config.json")


def save_whole(model: Any, folder: Path, stage: Stage) -> None:
    """config.json is the base's: a training changes nothing in it."""
    from capas.models.loading import save_model

    save_model(model, folder)
    for file in [stage.dep(QUANTIZED) / "config.json", *sorted(stage.dep(QUANTIZED).glob("*.py"))]:
        shutil.copyfile(file, folder / file.name)


def write_certificate(folder: Path, checks: dict[str, Any], params: Params, stage: Stage) -> None:
    """The weights' sha256, what was checked, DVC's md5 of its inputs, and the values in effect."""
    outs = [out for entry in recorded(stage.root).values() for out in entry.get("outs", [])]
    inputs = {out["path"]: out["md5"] for out in outs if out["path"] in stage.spec.deps}
    facts = {
        f"{'adapter' if tuned_weights.is_adapter(folder) else 'model'}_sha256": tuned_weights.sha256(
            folder
        ),
        "train_key": stage.key(),
        "global_batch_size": steps.Step.of(params.trainer, params.hardware).num_rows,
        "checks": checks,
        "inputs": dict(sorted(inputs.items())),
        "params": params.without(),
        "packages": stage.spec.values(stage.root)["environment.yaml"],
    }
    if params.lora.adapter_name_or_path is not None:
        start = stage.dep(adapter.FOLDER)
        facts["initial_adapter"] = read_json(start / adapter.ORIGIN) | {
            "sha256": tuned_weights.sha256(start)
        }
    write_json(stage.out("reports/certificate.json"), facts)


def commit_of(revision: str | None) -> str | None:
    """A commit on the Hub. What pins a local folder means nothing to whoever loads the adapter."""
    return revision if re.fullmatch(r"[0-9a-f]{40}", revision or "") else None


def sort_target_modules(file: Path) -> None:
    """PEFT writes a set: its order follows PYTHONHASHSEED."""
    config = read_json(file)
    ordered = {
        k: sorted(v) if k == "target_modules" and isinstance(v, list) else v
        for k, v in config.items()
    }
    file.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    launch.run("train", main)
