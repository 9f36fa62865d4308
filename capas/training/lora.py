"""Add LoRA layers as the lora group describes them, and load the weights of an initial adapter."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core.errors import CapasError, listed
from capas.core.files import read_json
from capas.core.params import Params
from capas.models import adapter
from capas.models.coverage import linear_layers

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger("capas")
# keys that are no arguments of peft.LoraConfig
OWN = ("preset", "adapter_name_or_path", "adapter_revision")


def trains_all(lora: Params) -> bool:
    """Return whether all weights are trained, without LoRA (lora=none)."""
    return lora.r is None


def make_config(lora: Params) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **lora.without(*OWN))


def check_target_modules(base: Any, target_modules: list[str] | str) -> None:
    """Check that lora.target_modules, names or a regular expression, matches linear layers of the base.

    PEFT ignores a name that matches no layer if another name matches one. It prints the whole model if a
    regular expression matches more than linear layers.

    Raises:
        CapasError: a name matches no linear layer, or another module; the message lists the linear layers.
    """
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        return
    modules = {name: module for name, module in base.named_modules() if name}
    linear = list(linear_layers(base))
    there = f"there are: {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in linear))}"
    if isinstance(target_modules, str):
        fitting = {target_modules: _fullmatches(target_modules, list(modules))}
        unknown = (
            f"the regular expression {target_modules!r} matches no linear layer (it must match "
            "whole names)"
        )
    else:
        fitting = {t: [n for n in modules if f".{n}".endswith(f".{t}")] for t in target_modules}
        missing = [name for name, found in fitting.items() if not set(linear) & set(found)]
        unknown = f"no linear layer is called {', '.join(missing)}"
    if any(not set(linear) & set(found) for found in fitting.values()):
        raise CapasError(f"lora.target_modules: {unknown}; {there}")
    others = [n for found in fitting.values() for n in found if n not in linear]
    if others:
        kinds = {f"{n.rpartition('.')[2]} ({type(modules[n]).__name__})": None for n in others}
        raise CapasError(
            f"lora.target_modules={_show(target_modules)} matches {len(others)} modules that are "
            f"not linear layers: {listed(list(kinds))}. Name linear layers only, e.g. "
            f"[q_proj,v_proj], or take all-linear; {there}"
        )


def _fullmatches(pattern: str, names: list[str]) -> list[str]:
    """Return the names that the pattern matches as a whole.

    Raises:
        CapasError: the pattern is not a regular expression.
    """
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise CapasError(
            f"lora.target_modules={pattern!r} is not a valid regular expression: {error}. Use "
            "all-linear, names in brackets ([q_proj,v_proj]), or an expression for whole names "
            "('.*\\.(q|v)_proj')"
        ) from None


def check_untied(model: Any) -> None:
    """Check that no LoRA layer of a `PeftModel` shares its weight with the embedding.

    A head that is tied to the embedding cannot be merged: the sum would change the embedding, too.

    Raises:
        CapasError: a layer shares it.
    """
    from peft.tuners.lora import LoraLayer

    embedding = model.get_input_embeddings()
    shared = getattr(embedding, "base_layer", embedding).weight
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    if tied := [name for name, layer in layers if layer.get_base_layer().weight is shared]:
        raise CapasError(
            f"lora.target_modules: {', '.join(n.rpartition('.')[2] for n in tied)} is tied to the "
            "embedding (tie_word_embeddings), so its update could not be merged. Remove it from "
            "the list"
        )


def whole_weights(model: Any) -> dict[str, Any]:
    """Return {name: weight} of the LoRA layers of a `PeftModel`, whole in every process (`batches.whole`)."""
    from capas.training.batches import whole

    named = model.named_parameters()
    return {name: whole(weight.detach()) for name, weight in named if "lora_" in name}


def load_initial(model: Any, folder: Path, base_name: str) -> None:
    """Load the adapter in `folder` into the LoRA layers of a `PeftModel`.

    Args:
        base_name: the name of the base, compared with the one that the adapter names.

    Raises:
        CapasError: the weights are damaged or not finite, or do not fit this base and this lora group.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from capas.models.weights import check_finite

    name = read_json(folder / adapter.ORIGIN)["adapter_name_or_path"]
    own = read_json(folder / adapter.CONFIG).get("base_model_name_or_path")
    try:
        weights = load_file(folder / adapter.WEIGHTS)
    except SafetensorError as error:
        raise CapasError(f"{adapter.WEIGHTS} of {name} is damaged: {error}") from None
    if base_name != own:
        log.warning(
            "the adapter %s was trained on %s; training continues on %s", name, own, base_name
        )
    check_finite(name, weights)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_layers(name, weights, expected, model)
    if wrong := sorted(k for k, v in weights.items() if v.shape != expected[k].shape):
        raise CapasError(
            f"{name} does not fit the base {base_name}: the shapes of {listed(wrong)} differ, so it "
            "is an adapter of another base"
        )
    set_peft_model_state_dict(model, weights)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = [k for k, v in weights.items() if not loaded[k].cpu().equal(v.to(loaded[k].dtype))]
    if lost:
        raise CapasError(f"PEFT did not load all weights of {name}: {listed(sorted(lost))}")


def _check_layers(name: str, weights: dict[str, Any], expected: dict[str, Any], model: Any) -> None:
    others = sorted(key for key in weights if ".lora_" not in key)
    if others:
        raise CapasError(
            f"{name} has weights that are not LoRA weights, which capas does not support: "
            f"{listed(others)}. Merge it into its base and name that model in "
            "model.model_name_or_path"
        )
    found, wanted = _layers(weights), _layers(expected)
    there = {layer for layer, _ in model.named_modules()}
    if strange := sorted(found - there):
        raise CapasError(
            f"{name} is an adapter of another base: this one has no layer called {listed(strange)}"
        )
    if found != wanted:
        raise CapasError(
            f"the lora group contradicts the initial adapter {name}: "
            f"lora.target_modules={_show(model.peft_config['default'].target_modules)} adapts "
            f"{len(wanted)} layers, and the adapter {len(found)}. Set "
            f"lora.target_modules={_show(_shortest(found, there))}"
        )
    if odd := sorted(weights.keys() ^ expected.keys()):
        raise CapasError(f"{name} does not have the weights that PEFT expects: {listed(odd)}")


def _layers(names: Any) -> set[str]:
    return {key.partition(".lora_")[0] for key in names}


def _shortest(found: set[str], there: set[str]) -> set[str]:
    """Return the last parts of the layers' names if no other layer has them, otherwise the whole names."""
    last = {layer.rpartition(".")[2] for layer in found}
    return last if {n for n in there if n.rpartition(".")[2] in last} == found else found


def _show(modules: Any) -> str:
    return modules if isinstance(modules, str) else f"[{','.join(sorted(modules or ()))}]"
