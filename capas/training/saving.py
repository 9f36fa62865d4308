"""Save the trained model as a folder that PEFT, transformers and servers load, and write its certificate."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core.dag import recorded
from capas.core.files import read_json, write_json
from capas.core.params import Params
from capas.core.stage import Stage
from capas.models import adapter, tuned_weights
from capas.training.steps import Step

if TYPE_CHECKING:
    import torch

FORMATTED, QUANTIZED, TOKENIZER = "data/formatted", "data/models/quantized", "data/models/tokenizer"


def save_tuned(
    model: Any,
    weights: dict[str, "torch.Tensor"] | None,
    params: Params,
    chat: dict[str, Any],
    stage: Stage,
) -> None:
    """Save the trained model with tokenizer, chat template and end tokens.

    Args:
        weights: the result of `lora.whole_weights`; None if all weights were trained.
        chat: chat.json of data/formatted.
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
    """Save the model with the config.json of the base, in which a training changes nothing."""
    from capas.models.loading import save_model

    save_model(model, folder)
    for file in [stage.dep(QUANTIZED) / "config.json", *sorted(stage.dep(QUANTIZED).glob("*.py"))]:
        shutil.copyfile(file, folder / file.name)


def write_certificate(folder: Path, checks: dict[str, Any], params: Params, stage: Stage) -> None:
    """Write the SHA-256 of the weights, the checks, DVC's md5 of the inputs, and the values in effect."""
    outs = [out for entry in recorded(stage.root).values() for out in entry.get("outs", [])]
    inputs = {out["path"]: out["md5"] for out in outs if out["path"] in stage.spec.deps}
    facts = {
        f"{'adapter' if tuned_weights.is_adapter(folder) else 'model'}_sha256": tuned_weights.sha256(
            folder
        ),
        "train_key": stage.key(),
        "global_batch_size": Step.of(params.trainer, params.hardware).num_rows,
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
    """Return the revision if it is a commit on the Hub, otherwise None.

    The digest that pins a local folder means nothing to those who load the adapter.
    """
    return revision if re.fullmatch(r"[0-9a-f]{40}", revision or "") else None


def sort_target_modules(file: Path) -> None:
    """Sort target_modules in a file: PEFT writes a set, whose order depends on PYTHONHASHSEED."""
    config = read_json(file)
    ordered = {
        k: sorted(v) if k == "target_modules" and isinstance(v, list) else v
        for k, v in config.items()
    }
    file.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", encoding="utf-8")
