"""Decide from config.json alone which models capas can fine-tune, and how their weights are stored."""

import re
from collections.abc import Iterator
from typing import Any

from capas.core.errors import CapasError

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_FULL_PRECISION = "Choose the full-precision model it was made from; capas quantizes it itself."
# The reasons, from transformers 5, why layers of these kinds cannot be trained through.
_REFUSED = {
    "gptq": "it needs the packages optimum and gptqmodel, which capas does not use",
    "awq": "it needs the package gptqmodel, which capas does not use",
    "compressed-tensors": "it needs the package compressed-tensors, which capas does not use",
    "fp8": "its kernels have no backward pass, so that no gradient goes through it",
    "fbgemm_fp8": "its kernels have no backward pass, so that no gradient goes through it",
    "mxfp4": "its kernels have no backward pass, so that no gradient goes through it",
}
# num_experts, num_local_experts, n_routed_experts, moe_num_experts; not shared experts, not experts per token
_NUM_EXPERTS = re.compile(r"(\w+_)?(num|n)_((?!shared)\w+_)?experts")
_4BIT = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant")


def num_positions(config: Any) -> int | None:
    """Return the tokens that the context of a model with this `PretrainedConfig` has; None: no limit."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def check_supported(config: dict[str, Any], name: str) -> None:
    """Check that capas can train a model with this config.json.

    Raises:
        CapasError: see `check_causal` and `check_dense`.
    """
    check_causal(config, name)
    check_dense(config, name)


def check_causal(config: dict[str, Any], name: str) -> None:
    """Refuse a model that does not predict the next token from the tokens before it.

    Args:
        config: config.json, parsed.
        name: the model's name, for the message.

    Raises:
        CapasError: an encoder-only model (BERT), an encoder-decoder (T5), or no architecture named.
    """
    architectures = config.get("architectures") or []
    if not architectures:
        raise CapasError(
            f"{name}: config.json has no `architectures`; capas needs a causal language model"
        )
    if config.get("is_encoder_decoder"):
        raise CapasError(
            f"{name} is an encoder-decoder ({architectures[0]}): prompt and answer go through "
            "different stacks. capas trains decoder-only models only, e.g. Llama, Qwen, Mistral or "
            "Gemma."
        )
    if not any(a.endswith(_CAUSAL) for a in architectures) or config.get("is_decoder") is False:
        raise CapasError(
            f"{name} is an encoder-only model ({architectures[0]}): every token attends to the "
            "tokens after it, so the model cannot generate token by token. Choose a causal "
            "language model, e.g. Llama, Qwen, Mistral or Gemma."
        )


def check_dense(config: dict[str, Any], name: str) -> None:
    """Refuse a mixture of experts, whose experts neither `all-linear` nor bitsandbytes reaches.

    transformers 5 keeps the experts of a layer in one three-dimensional parameter, which is not a linear
    layer: LoRA would train only the attention, and quantization would leave most weights unchanged.

    Args:
        config, name: see `check_causal`.

    Raises:
        CapasError: a layer has more than one expert.
    """
    for key, number in _num_experts(config):
        if number > 1:
            raise mixture_of_experts(
                name, config.get("architectures"), f"its config.json says {key}={number}"
            )


def mixture_of_experts(name: str, architectures: list[str] | None, sign: str) -> CapasError:
    return CapasError(
        f"{name} is a mixture of experts ({', '.join(architectures or ['unnamed'])}: {sign}). Neither LoRA "
        "nor bitsandbytes reaches its experts, which hold most of its weights, so capas does not train it. "
        "Choose a dense model, e.g. model=qwen2.5_0.5b_instruct"
    )


def _num_experts(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, int]]:
    """Yield (dotted key, number) for every key of config.json that gives the experts of a layer."""
    if not _has_routed_layers(config):
        return
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _num_experts(value, f"{path}{key}.")
        elif _NUM_EXPERTS.fullmatch(str(key)):
            numbers = value if isinstance(value, list) else [value]  # a list has one per layer
            yield f"{path}{key}", max((n for n in numbers if isinstance(n, int)), default=0)


def _has_routed_layers(config: dict[str, Any]) -> bool:
    """Return whether the model uses its numbers of experts: some families also have dense models."""
    if config.get("is_moe") is False or config.get("enable_moe_block") is False:  # Doge, Gemma 4
        return False
    if pattern := config.get("hybrid_override_pattern"):  # Nemotron-H: E stands for an expert layer
        return "E" in pattern
    kinds = config.get("layers_block_type")
    return config.get("model_type") != "nemotron_h" or kinds is None or "moe" in kinds


def stored_quantization(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the keys of the quantization group for weights that are already quantized with bitsandbytes.

    Args:
        config, name: see `check_causal`.

    Returns:
        None for weights in full precision. For 8-bit weights only load_in_4bit and load_in_8bit.

    Raises:
        CapasError: the quantization method is not named, or capas cannot train through it.
    """
    stored = config.get("quantization_config")
    if stored is None:
        return None
    bits = {key: bool(stored.get(key)) for key in ("load_in_4bit", "load_in_8bit")}
    method = stored.get("quant_method") or ("bitsandbytes" if any(bits.values()) else "unnamed")
    if method != "bitsandbytes" or not any(bits.values()):
        reason = _REFUSED.get(method, "capas does not support this method")
        raise CapasError(
            f"model.model_name_or_path={name} cannot be trained: its config.json says "
            f"quantization_config.quant_method={method}, and {reason}. {_FULL_PRECISION}"
        )
    return bits | ({key: stored[key] for key in _4BIT} if bits["load_in_4bit"] else {})


def check_stored_quantization(stored: dict[str, Any], asked: dict[str, Any], name: str) -> None:
    """Check that the requested quantization is that of the stored weights, which are used as they are.

    Raises:
        CapasError: they differ; the message gives the overrides that match.
    """
    wrong = [key for key, value in stored.items() if asked[key] != value]
    if wrong:
        method = stored.get("bnb_4bit_quant_type", "int8")
        options = [f"quantization={method}"]
        options += [
            f"quantization.{k}={str(v).lower()}" for k, v in stored.items() if k in _4BIT[1:]
        ]
        given = ", ".join(f"quantization.{key}={str(asked[key]).lower()}" for key in wrong)
        raise CapasError(
            f"{given}, but the weights of {name} are already quantized with bitsandbytes and cannot "
            f"be quantized again. To train on them as they are: {', '.join(options)}. "
            f"{_FULL_PRECISION}"
        )
