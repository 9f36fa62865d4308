"""Load models for the stages: the base in full precision or quantized, and the tuned model."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.params import Params
from capas.core.progress import doing
from capas.models.architecture import check_supported, stored_quantization
from capas.models.coverage import check_modules_dense, quantized_linears
from capas.models.kernels import keep_weights_unpacked
from capas.models.tuned_weights import is_adapter

transformers_logging.disable_progress_bar()
keep_weights_unpacked()  # because all code that loads a model imports this: test_kernels.py
log = logging.getLogger("capas")
MAX_SHARD_SIZE = "2GB"  # a shard is copied before it is written


def load_model(folder: Path, model: Params, device: torch.device, **kwargs: Any) -> PreTrainedModel:
    """Load `AutoModelForCausalLM.from_pretrained(folder)`, and check that it matches the request.

    Args:
        folder: a folder from `save_pretrained`; its config.json tells whether and how it is quantized.
        model: the params group, or the part of it that a stage declares.
        kwargs: passed on, e.g. `quantization_config`.

    Raises:
        CapasError: not a causal language model, weights missing or damaged, or not loaded as requested.
    """
    config = read_json(folder / "config.json")
    check_supported(config, str(folder))
    stored = stored_quantization(config, str(folder))
    requested = model.without("model_name_or_path", "revision")
    try:
        with doing(f"loading {folder.name}"):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                folder, device_map={"": device}, output_loading_info=True, **requested, **kwargs
            )
    except (ImportError, ValueError, OSError, SafetensorError) as error:
        if getattr(error, "errno", None):  # an error of the machine, not of the model
            raise
        raise CapasError(f"{folder} cannot be loaded with {requested}: {error}") from None
    check_modules_dense(loaded, str(folder))
    _check_weights(folder, info)
    check_loaded(requested, loaded)
    check_quantized(loaded, stored, folder)
    _check_blocks(loaded)
    return loaded.eval()


def check_quantized(model: nn.Module, stored: dict[str, Any] | None, folder: Path) -> None:
    """Check that weights stored as quantized (`stored`) in `folder` are quantized in `model` too.

    Raises:
        CapasError: they are not.
    """
    if stored and quantization_method(model) == "none":
        raise CapasError(f"{folder} has quantized weights, but they were loaded as unquantized")


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Save a model in shards, tied weights once, readable for everyone.

    safetensors writes files that only their owner can read.
    """
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    for file in folder.iterdir():
        file.chmod(0o644)


class TunedModel:
    """The tuned model, `model`, and its base.

    Args:
        folder: the result of the training, an adapter or a whole model.
        model, device: arguments of `load_model`.
        load_base: loads the base; with a whole model it is called only when the base is needed.
    """

    def __init__(
        self,
        folder: Path,
        model: Params,
        device: torch.device,
        load_base: Callable[[], PreTrainedModel],
    ) -> None:
        self.is_adapter, self._load_base = is_adapter(folder), load_base
        self._base: Any = None
        self.model: Any = (
            attach_adapter(load_base(), folder)
            if self.is_adapter
            else load_model(folder, model, device)
        )

    @contextmanager
    def base(self) -> Iterator[Any]:
        """Yield the model before the training: with the adapter switched off, or the separate base model."""
        if self.is_adapter:
            with self.model.disable_adapter():
                yield self.model
            return
        if self._base is None:
            with torch.random.fork_rng():  # loading must not change the caller's random state
                self._base = self._load_base()
        yield self._base


def attach_adapter(model: PreTrainedModel, folder: Path) -> nn.Module:
    """Return the model with the trained adapter in `folder`, for inference.

    Raises:
        CapasError: the adapter has weights that do not fit the model, or the model needs others.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except RuntimeError as error:  # load_state_dict: sizes differ
        raise CapasError(f"{folder} does not fit the base model: {error}") from None
    saved, expected = (
        set(_adapter_names(folder)),
        set(get_peft_model_state_dict(tuned, save_embedding_layers=False)),
    )
    if saved != expected:
        odd = sorted(saved ^ expected)
        raise CapasError(
            f"{folder} does not fit the base model: {', '.join(odd[:4])} ({len(odd)} in all)"
        )
    return tuned.eval()


def quantization_method(model: nn.Module) -> str:
    """Return nf4, fp4, int8 or none, read from the layers themselves, not from the configuration."""
    found = {
        module.weight.quant_type if type(module).__name__ == "Linear4bit" else "int8"
        for _, module in quantized_linears(model)
    }
    return "+".join(sorted(found)) or "none"


def dequantize(layer: Any) -> torch.Tensor:
    """Return the weight that a bitsandbytes layer computes with, float32 [out, in]."""
    import bitsandbytes as bnb

    weight = layer.weight
    if type(layer).__name__ == "Linear4bit":
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)


def _adapter_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        return list(weights.keys())


def _check_weights(folder: Path, info: dict[str, Any]) -> None:
    """Check that all weights were found; transformers only warns when it fills one with random numbers."""
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            names = ", ".join(sorted(str(key) for key in info[kind])[:4])
            raise CapasError(
                f"the weights in {folder} do not match its config.json: "
                f"{kind.replace('_', ' ')}: {names}"
            )
    if unused := sorted(str(key) for key in info.get("unexpected_keys") or ()):
        log.warning(
            "%s has %d weights that its config.json does not define, e.g. %s: they are ignored",
            folder, len(unused), ", ".join(unused[:3]),
        )  # fmt: skip


def check_loaded(requested: dict[str, Any], model: PreTrainedModel) -> None:
    """Check that the model uses the requested attention and dtype.

    transformers omits the soft-capping of attention logits (Gemma 2) if sdpa computes the attention.

    Raises:
        CapasError: it does not, or sdpa would omit the soft-capping.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped is not None and requested.get("attn_implementation") == "sdpa":
        raise CapasError(
            f"model.attn_implementation=sdpa: {type(model).__name__} caps its attention logits at "
            f"{capped:g}, which sdpa does not support. Choose eager, or flash_attention_2 on a GPU"
        )
    used = {
        "attn_implementation": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    for name, value in used.items():
        if requested.get(name, value) != value:
            raise CapasError(
                f"model.{name}={requested[name]}, but {type(model).__name__} uses {value}"
            )


def _check_blocks(model: nn.Module) -> None:
    """Check that on a CPU each 4-bit layer's rows are whole blocks.

    bitsandbytes quantizes a weight in blocks that may cross the ends of its rows, but its CPU kernels assume
    that a block ends with the row. Otherwise they compute something else: a layer is then 25 % off instead
    of 9 % (measured, bitsandbytes 0.50).
    """
    for name, layer in quantized_linears(model):
        state = getattr(layer.weight, "quant_state", None)
        if state and layer.weight.device.type == "cpu" and layer.in_features % state.blocksize:
            raise CapasError(
                f"{name} has {layer.in_features} inputs, which is not a multiple of "
                f"{state.blocksize}: on a CPU bitsandbytes computes such 4-bit layers wrongly. "
                "Choose quantization=int8 or none, or a GPU"
            )
