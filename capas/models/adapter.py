"""Check adapters in PEFT's format that a training may start from, using adapter_config.json alone.

The keys that decide the tensors (r, target_modules, use_dora) and their meaning (lora_alpha, use_rslora)
must agree with the lora group, because the group describes the whole training, also in reports and in
MLflow. Dropout belongs to a training and may differ. Keys that the group does not have are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.params import Params

FOLDER = "data/models/initial_adapter"
ORIGIN, CONFIG, WEIGHTS = "origin.json", "adapter_config.json", "adapter_model.safetensors"
# Keys that must agree with the lora group, with PEFT's defaults.
COMPARED = {"r": None, "lora_alpha": None, "use_rslora": False, "use_dora": False}
_KEPT_BASE = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base's weights
# Keys without effect on an adapter's output, or known from the names of its tensors.
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "revision", "target_modules", "exclude_modules", "lora_dropout"),
    *("init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "layers_pattern"),
}


def check_kind(config: Mapping[str, Any], name: str) -> None:
    """Refuse an adapter that is not LoRA, or whose training capas cannot continue.

    Args:
        config: adapter_config.json, parsed.
        name: the adapter's name, for the message.

    Raises:
        CapasError: it is not LoRA, or a key is not supported; the message names each key with its value.
    """
    if config.get("peft_type") != "LORA":
        raise CapasError(
            f"{name} is not a LoRA adapter: its {CONFIG} says peft_type={config.get('peft_type')}. "
            "Merge it into its base with PEFT (merge_and_unload) and name that model in "
            "model.model_name_or_path"
        )
    odd = {
        key: value
        for key, value in config.items()
        if key not in {*_WITHOUT_EFFECT, *COMPARED} and value not in (None, False, "none", [], {})
    }
    if config.get("init_lora_weights", True) not in _KEPT_BASE:
        odd["init_lora_weights"] = config["init_lora_weights"]
    if odd:
        listed = ", ".join(f"{key}={value}" for key, value in sorted(odd.items()))
        raise CapasError(
            f"training cannot start from {name}: its {CONFIG} says {listed}, which capas does not "
            "support. Merge it into its base (PEFT's merge_and_unload) and name that model in "
            "model.model_name_or_path"
        )


def check_agreement(config: Mapping[str, Any], lora: Mapping[str, Any], name: str) -> None:
    """Check that the lora group describes the initial adapter, whose rank and scaling cannot change.

    Args:
        config: adapter_config.json, parsed.
        lora: the params group.
        name: the adapter's name, for the message.

    Raises:
        CapasError: they differ; the message names each key with both values.
    """
    own = {key: config.get(key, default) for key, default in COMPARED.items()}
    wrong = [key for key, value in own.items() if lora[key] != value]
    if wrong:
        differences = ", ".join(
            f"lora.{key}={lora[key]}, the adapter has {own[key]}" for key in wrong
        )
        ways = " ".join(f"lora.{key}={str(own[key]).lower()}" for key in wrong)
        raise CapasError(
            f"the lora group contradicts the initial adapter {name}: {differences}. Set {ways}"
        )


def check_origin(folder: Path, lora: Mapping[str, Any]) -> None:
    """Check that `folder` holds the adapter that the lora group names now.

    Raises:
        CapasError: fetch_model fetched another adapter, as happens in a debug run of `train`.
    """
    origin = read_json(folder / ORIGIN)
    for key, value in origin.items():
        if lora[key] != value:
            raise CapasError(
                f"lora.{key}={lora[key]}, but {FOLDER} was fetched for {value}. Run `dvc repro` "
                "to fetch the new adapter"
            )


def find_initial(folder: Path, lora: Params) -> Path | None:
    """Return the folder of the adapter that a training starts from; None where it starts from none.

    Args:
        folder: as fetch_model wrote it.
        lora: the params group.

    Raises:
        CapasError: the lora group contradicts it, or another one is there than it names.
    """
    check_origin(folder, lora.without())
    if lora.adapter_name_or_path is None:
        return None
    check_agreement(read_json(folder / CONFIG), lora.without(), lora.adapter_name_or_path)
    return folder
