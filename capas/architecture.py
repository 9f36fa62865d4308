"""Which models capas can fine-tune, told from a model's config.json alone."""

from typing import Any

from capas.errors import CapasError

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def check_causal(config: dict[str, Any], name: str) -> None:
    """Refuse what does not predict the next token from the tokens before it.

    Args:
        config: config.json, parsed.
        name: of the model, for the message.

    Raises:
        CapasError: an encoder-only model (BERT), an encoder-decoder (T5), or no architecture named.
    """
    architectures = config.get("architectures") or []
    if not architectures:
        raise CapasError(
            f"{name}: config.json names no architectures; a causal language model is needed"
        )
    if config.get("is_encoder_decoder"):
        raise CapasError(
            f"{name} is an encoder-decoder ({architectures[0]}): its prompt and its answer go through "
            "different stacks. capas tunes decoder-only models, e.g. Llama, Qwen, Mistral or Gemma."
        )
    if not any(a.endswith(_CAUSAL) for a in architectures) or config.get("is_decoder") is False:
        raise CapasError(
            f"{name} is an encoder-only model ({architectures[0]}): each of its tokens sees the tokens after "
            "it, so it cannot write an answer token by token. Choose a causal language model, "
            "e.g. Llama, Qwen, Mistral or Gemma."
        )
