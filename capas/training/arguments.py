"""Turn the trainer group into arguments of `transformers.Trainer`."""

from pathlib import Path
from typing import TYPE_CHECKING

from capas.core import extras
from capas.core.errors import CapasError
from capas.core.params import Params

if TYPE_CHECKING:
    from transformers import TrainingArguments
OWN = (  # keys that are no arguments of transformers.Trainer
    "backend",
    *("packing_length", "fused_lora", "loraplus_lr_ratio", "save_total_limit"),
    *("metric_for_best_model", "metric_records", "metric_max_new_tokens"),
    *("early_stopping_patience", "early_stopping_threshold", "divergence_factor"),
)


def training_arguments(params: Params, folder: Path, metric: str) -> "TrainingArguments":
    """Return the arguments in the trainer group, with those that the stage decides.

    Args:
        folder: the folder of the checkpoints.
        metric: the name of the metric that chooses the best checkpoint; the loss alone is better when lower.

    Raises:
        CapasError: transformers rejects the trainer group, e.g. bf16 on a GPU that lacks it; or Liger's
            kernels are not installed.
    """
    from transformers import TrainingArguments

    on_cpu, given = params.hardware.device == "cpu", params.trainer.without("preset", *OWN)
    if params.trainer.use_liger_kernel:
        extras.require("gpu", "trainer.use_liger_kernel=true")
    if params.trainer.backend == "unsloth":
        given["gradient_checkpointing"] = False  # the model uses Unsloth's own
    divided = params.hardware.distributed_type == "fsdp2"
    try:
        return TrainingArguments(
            fsdp=divided or None,
            fsdp_config={"version": 2} if divided else None,
            **given,
            output_dir=str(folder),
            metric_for_best_model=metric,
            greater_is_better=metric != "loss",
            use_cpu=on_cpu,
            eval_strategy="steps",
            save_strategy="steps",
            logging_nan_inf_filter=False,  # Trainer would log the mean of earlier losses instead of NaN
            gradient_checkpointing_kwargs={"use_reentrant": False},
            remove_unused_columns=False,
            dataloader_pin_memory=not on_cpu,
            # DDP then keeps its buckets. Sums over three or more processes depend on the buckets, and a
            # resumed training must repeat them.
            ddp_find_unused_parameters=True,
            report_to="none",  # see capas/training/live_rows.py
            disable_tqdm=True,  # see capas.training.callbacks.Progress
        )
    except (ValueError, ImportError) as error:
        raise CapasError(f"transformers rejects the trainer group: {error}") from None
