"""Write the reports of a training: its facts, its headline, its curves."""

import logging
from typing import TYPE_CHECKING, Any

from capas.core.files import write_csv, write_json
from capas.core.stage import Stage
from capas.training.record_scores import FILE as RECORD_SCORES
from capas.training.record_scores import write_scores
from capas.training.steps import Step

if TYPE_CHECKING:
    from capas.training.trainer import Trainer
log = logging.getLogger("capas")
HISTORY = ("step", "epoch", "loss", "learning_rate", "grad_norm")
HEADLINE = ("num_steps", "train_loss")  # and the scores of the kept step


def write_reports(
    trainer: "Trainer",
    step: Step,
    checked: dict[str, Any],
    curve: tuple[str, ...],
    stage: Stage,
) -> None:
    """Write reports/train.json, reports/metrics/train.json and the curves.

    Args:
        checked: more facts for reports/train.json.
        curve: the names of the scores of an evaluation.
    """
    facts = {"train_key": stage.key(), **summary(trainer, step, curve), **checked}
    write_json(stage.out("reports/train.json"), facts)
    headline = (*HEADLINE, *(f"validation_{name}" for name in curve))
    write_json(stage.out("reports/metrics/train.json"), {name: facts[name] for name in headline})
    write_curves(trainer.state.log_history, curve, stage)
    ids = [example["id"] for example in trainer.eval_dataset]
    write_scores(stage.out(RECORD_SCORES), ids, trainer.record_scores.of(facts["kept_step"]))


def summary(trainer: "Trainer", step: Step, curve: tuple[str, ...]) -> dict[str, Any]:
    """Return the facts of reports/train.json, without seconds, which differ from run to run."""
    state, history = trainer.state, trainer.state.log_history
    num_trainable, num_parameters = count_parameters(trainer.model)
    rows = [row for row in history if "eval_loss" in row]
    last = rows[-1]
    kept = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    chosen = next(row for row in rows if row["step"] == kept)
    if trainer.args.load_best_model_at_end:
        tell_choice(chosen, trainer.args)
    return {
        "num_steps": state.global_step,
        "global_batch_size": step.num_rows,
        "kept_step": kept,  # the step whose weights are saved
        "num_epochs": state.epoch,
        "num_train_tokens": last["num_tokens"],
        "num_supervised_tokens": last["num_supervised_tokens"],
        "num_trainable_parameters": num_trainable,
        "num_parameters": num_parameters,
        "train_loss": mean_loss(history),
        **{f"validation_{name}": chosen[f"eval_{name}"] for name in curve},
        "learning_rate": trainer.args.learning_rate,
    }


def tell_choice(chosen: dict[str, Any], args: Any) -> None:
    """Log which step's weights are kept, and why."""
    name = args.metric_for_best_model
    log.info(
        "the weights of step %d are kept: the first with the %s %s, %.4f",
        chosen["step"], "highest" if args.greater_is_better else "lowest", name, chosen[f"eval_{name}"],
    )  # fmt: skip


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the number of trainable parameters, and of all; tied ones count once."""
    if hasattr(model, "get_nb_trainable_parameters"):
        found: tuple[int, int] = model.get_nb_trainable_parameters()
        return found
    return model.num_parameters(only_trainable=True), model.num_parameters()


def mean_loss(history: list[dict[str, Any]]) -> float:
    """Return the mean loss over all steps; a row's loss is the mean since the row before."""
    rows = [row for row in history if "loss" in row]
    steps = [
        row["step"] - before
        for row, before in zip(rows, [0, *(r["step"] for r in rows)], strict=False)
    ]
    return sum(row["loss"] * n for row, n in zip(rows, steps, strict=True)) / sum(steps)


def write_curves(history: list[dict[str, Any]], curve: tuple[str, ...], stage: Stage) -> None:
    """Write the curves of training and validation.

    Args:
        history: the log of the Trainer.
        curve: the columns of reports/validation.csv after step and epoch.
    """
    write_csv(stage.out("reports/history.csv"), HISTORY, [row for row in history if "loss" in row])
    validation = [
        {
            "step": row["step"],
            "epoch": row["epoch"],
            **{name: row[f"eval_{name}"] for name in curve},
        }
        for row in history
        if "eval_loss" in row
    ]
    write_csv(stage.out("reports/validation.csv"), ("step", "epoch", *curve), validation)
