"""Train LoRA layers on the frozen, quantized base; or, with lora=none, all weights of one in full precision.

Reads   data/formatted (train, validation), data/models/quantized, data/models/tokenizer;
        data/models/initial_adapter, from which the training starts if it holds an adapter;
        data/composed/checkpoint_metric.json, a metric of the user's own that chooses the checkpoint
Writes  data/models/adapter (a whole model if all weights are trained), reports/train.json,
        reports/history.csv, reports/validation.csv,
        reports/validation_records.parquet (the scores of each validation record),
        reports/certificate.json (the checks of the result, and what it was made from)
Params  hardware, lora, model, trainer

The travelling record is a row of ids; only labels other than -100 carry loss:

    input_ids  <|im_start|> assistant \\n   {"name": "set_timer", "arguments": ...} <|im_end|> \\n
    labels             -100      -100 -100  {"name": "set_timer", "arguments": ...} <|im_end|> -100

Before the training, the model continues as in pretraining ("Okay, 99 minutes from now."); afterwards, with
the call.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core.files import read_json
from capas.core.params import Params
from capas.core.stage import Stage, log
from capas.models import adapter, hardware
from capas.training import launch, live_rows, unsloth
from capas.training.adapted_model import add_lora
from capas.training.arguments import training_arguments
from capas.training.fit import check_lengths, check_memory, check_tokens, num_tokens
from capas.training.results import write_reports
from capas.training.saving import save_tuned, write_certificate
from capas.training.steps import Step

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from capas.evaluation.checkpoint_metric import CheckpointMetric
    from capas.training.batches import Collator, Example
    from capas.training.objective import Objective
    from capas.training.trainer import Trainer

FORMATTED, QUANTIZED, TOKENIZER = "data/formatted", "data/models/quantized", "data/models/tokenizer"


@dataclass(frozen=True)
class Data:
    """The objective of the training, and the examples of both splits.

    `rows` make the batches: packed rows, or the training examples. `answers` is the metric that chooses the
    checkpoint, if answers are generated for it.
    """

    objective: "Objective"
    chat: dict[str, Any]
    train: "list[Example]"
    rows: "list[Example]"
    validation: "list[Example]"
    collator: "Collator"
    answers: "CheckpointMetric | None"


def main(params: Params, stage: Stage) -> None:
    # hardware is prepared before torch is imported, and Unsloth imported before transformers
    device = hardware.prepare(params.hardware, params.hardware.num_processes)
    if params.trainer.backend == "unsloth":
        unsloth.prepare(stage.root)
    initial = adapter.find_initial(stage.dep(adapter.FOLDER), params.lora)
    follows = launch.is_main() and not stage.debug
    check_tracker = live_rows.start_check(stage.root, enabled=follows)
    from capas.training import capacity, certificate
    from capas.training.objective import AnswerTokens

    data = read_data(AnswerTokens(), params, stage)
    model = make_model(params, data, initial, device, stage)
    base_sha256 = certificate.fingerprint(model)
    proofs = prove(model, data, params)
    args = training_arguments(params, stage.checkpoints(), metric_name(params))
    trainer = make_trainer(model, args, data, params)
    check_tracker()
    train(trainer, curve_of(data), stage, follows)
    folder = save(trainer, proofs, data, params, stage)
    checks = check_saved(trainer, folder, base_sha256, initial, data, params, device)
    if launch.is_main():
        write_certificate(folder, checks, params, stage)
        stage.costs |= capacity.device_costs(device) | hardware.machine()


def read_data(objective: "Objective", params: Params, stage: Stage) -> Data:
    """Read data/formatted, and pack the training examples if trainer.packing_length is set."""
    from capas.evaluation.checkpoint_metric import load_metric
    from capas.training.lora import trains_all
    from capas.training.packing import pack

    chat = read_json(stage.dep(FORMATTED) / "chat.json")
    train = objective.read(stage.dep(FORMATTED) / "train.parquet")
    validation = objective.read(stage.dep(FORMATTED) / "validation.parquet")
    flatten = params.model.attn_implementation == "flash_attention_2"
    packed = params.trainer.packing_length
    rows = train if packed is None else pack(train, packed)
    collator = objective.collator(chat, flatten)
    answers = load_metric(params, chat, num_tokens(rows), trains_all(params.lora), stage)
    return Data(objective, chat, train, rows, validation, collator, answers)


def make_model(
    params: Params, data: Data, initial: Path | None, device: "torch.device", stage: Stage
) -> Any:
    """Load the base, once the records are known to fit, and make the weights to be trained trainable.

    Raises:
        CapasError: the training needs more memory than is available, a record is longer than the model's
            context, a token has no row in the embedding, or the lora group does not fit the base.
    """
    from capas.training import lora
    from capas.training.base_model import load_base, unfreeze

    folder, records = stage.dep(QUANTIZED), [*data.train, *data.validation]
    lengths = num_tokens(records)
    check_memory(num_tokens(data.rows), num_tokens(data.validation), params, device, stage)
    check_lengths(folder, lengths, params.model.trust_remote_code)
    check_tokens(records, data.chat, folder, stage.dep(TOKENIZER))
    base = load_base(folder, stage.dep(TOKENIZER), params, max(lengths), device)
    return unfreeze(base) if lora.trains_all(params.lora) else add_lora(base, params, initial)


def prove(model: Any, data: Data, params: Params) -> dict[str, Any]:
    """Check on real records, before the first step, that packing and evaluation change nothing.

    Returns:
        The facts, for reports/train.json.
    """
    from capas.training import fused, used_settings
    from capas.training.batches import tails
    from capas.training.packing import prove_packing

    packing = prove_packing(model, data.train, data.rows, data.collator, params.trainer)
    if params.trainer.fused_lora:
        fused.fuse(model)
    probes = data.collator(tails(data.validation[:2]))
    return {"packing": packing, "gradient_check": used_settings.check_gradients(model, probes)}


def metric_name(params: Params) -> str:
    """Return the name of the metric that chooses the checkpoint: of FILE.py:FUNCTION, the function's."""
    found: str = params.trainer.metric_for_best_model
    return found.rpartition(":")[2]


def curve_of(data: Data) -> tuple[str, ...]:
    """Return the names of the validation scores: those of the objective, and a metric of answers."""
    return data.objective.curve + ((data.answers.name,) if data.answers else ())


def make_trainer(model: Any, args: "TrainingArguments", data: Data, params: Params) -> "Trainer":
    """Return a trainer that checks, at its first step, that it computes with the requested settings."""
    from capas.training import schedule, used_settings
    from capas.training.early_stopping import EarlyStopping
    from capas.training.trainer import Trainer

    trainer = Trainer(
        save_total_limit=params.trainer.save_total_limit,
        divergence_factor=params.trainer.divergence_factor,
        loraplus_lr_ratio=params.trainer.loraplus_lr_ratio,
        answers=data.answers,
        model=model,
        args=args,
        train_dataset=data.rows,
        eval_dataset=data.validation,
        data_collator=data.collator,
        compute_loss_func=data.objective.loss,
        preprocess_logits_for_metrics=data.objective.score,
        compute_metrics=data.objective.summarize,
    )
    if params.trainer.early_stopping_patience:
        patience = params.trainer.early_stopping_patience
        threshold = params.trainer.early_stopping_threshold
        trainer.add_callback(EarlyStopping(metric_name(params), patience, threshold))

    def check() -> None:
        used_settings.check_trainer(trainer, params)
        schedule.check_schedule(trainer)
        step = Step.of(params.trainer, params.hardware)
        in_epoch, in_all = step.num_in_epoch(len(data.rows)), trainer.state.max_steps
        log.info("%s; %d steps per epoch, %d in total", step, in_epoch, in_all)

    trainer.check_at_start(check)
    return trainer


def train(trainer: "Trainer", curve: tuple[str, ...], stage: Stage, follows: bool) -> None:
    """Train, and resume from the last complete checkpoint of these inputs if there is one.

    Args:
        curve: names of the validation scores, which a pause records.
        follows: send the rows of the log to the tracker meanwhile.
    """
    from capas.training import pause
    from capas.training.callbacks import LiveRows
    from capas.training.checkpoints import last_checkpoint
    from capas.training.pause_callback import Pause

    if until := pause.requested():
        folder = Path(trainer.args.output_dir)
        trainer.add_callback(Pause(trainer, until, folder, curve))
    with trainer.args.main_process_first(local=False):  # it removes half-written checkpoints
        checkpoint = last_checkpoint(Path(trainer.args.output_dir), resume=not stage.debug)
    trainer.args.eval_on_start = checkpoint is None  # the curve begins with the base
    with live_rows.tracker(stage.root, stage.key(), enabled=follows) as log_rows:
        trainer.add_callback(LiveRows(log_rows.append))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def save(
    trainer: "Trainer", proofs: dict[str, Any], data: Data, params: Params, stage: Stage
) -> Path:
    """Write the reports and the trained model; return the model's folder.

    Collective: every process must call it.
    """
    from capas.training import lora, used_settings

    weights = None if lora.trains_all(params.lora) else lora.whole_weights(trainer.model)
    if launch.is_main():
        facts = {"packing": proofs["packing"], "used": used_settings.describe(trainer)}
        facts["gradient_check"] = proofs["gradient_check"]
        facts["answers"] = data.answers and data.answers.facts()
        step = Step.of(params.trainer, params.hardware)
        write_reports(trainer, step, facts, curve_of(data), stage)
        save_tuned(trainer.model, weights, params, data.chat, stage)
    folder = launch.is_main() and stage.out("data/models/adapter")
    found: Path = launch.broadcast_from_main(folder)
    return found


def check_saved(
    trainer: "Trainer",
    folder: Path,
    base_sha256: str,
    initial: Path | None,
    data: Data,
    params: Params,
    device: "torch.device",
) -> dict[str, Any]:
    """Check the saved model against the trained one; return the facts for the certificate."""
    from capas.training import certificate, lora
    from capas.training.base_model import load_plain, release
    from capas.training.batches import tails

    probes = data.collator(tails(data.validation[:4]))
    if lora.trains_all(params.lora):
        load = partial(load_plain, folder, params, device)
        return certificate.check_whole(release(trainer), folder, probes, base_sha256, load)
    return certificate.check_adapter(trainer.model, folder, probes, base_sha256, initial)


if __name__ == "__main__":
    launch.run("train", main)
