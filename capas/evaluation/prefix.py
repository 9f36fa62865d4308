"""Compute the keys and values of the tokens with which all prompts begin (system prompt, tools) once.

Batches are padded on the left. In a row that begins with p columns of padding, the first n columns hold the
first n - p tokens of a prefix of n: they are copied, and the model computes the other columns. Columns,
positions and mask are those of a batch without a shared prefix.
"""

import copy
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from capas.evaluation.greedy import new_cache
from capas.models.coverage import unwrapped

# Rotary embeddings whose angles depend on the length of the whole text: a prefix alone has others
_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Prefix:
    """The first tokens of all prompts, and for each layer their keys and values [1, heads, tokens, width]."""

    num_tokens: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(states.nbytes for layer in self.layers for states in layer)

    def cache_of(self, padding: list[int]) -> DynamicCache:
        """Return the first `num_tokens` columns of a batch; each row begins with its `padding`."""
        cache = DynamicCache()
        for i, states in enumerate(self.layers):
            keys, values = (torch.cat([self._shifted(s, p) for p in padding]) for s in states)
            cache.update(keys, values, i)
        return cache

    def _shifted(self, states: torch.Tensor, padding: int) -> torch.Tensor:
        kept = max(self.num_tokens - padding, 0)
        return pad(states[:, :, :kept], (0, 0, self.num_tokens - kept, 0))


def shared_prefix(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig
) -> Prefix | None:
    """Return the prefix of several prompts; None if they share none or the model cannot continue a copy."""
    num_tokens = shared_length(prompts) if len(prompts) > 1 else 0
    if not num_tokens or not is_copyable(model):
        return None
    cache = new_cache(model)
    ids = torch.tensor([prompts[0][:num_tokens]], device=model.device)
    config = copy.copy(config)
    config.max_new_tokens = 1  # its forward pass fills the cache
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        past_key_values=cache,
    )
    return _prefix(cache, num_tokens)


def prefix_of(model: PreTrainedModel, ids: list[int]) -> Prefix | None:
    """Return the prefix with these ids, for a model in eval mode that `is_copyable`; None without a cache."""
    cache = new_cache(model)
    inputs = torch.tensor([ids], device=model.device)
    few = {"logits_to_keep": 1} if unwrapped(model)._supports_logits_to_keep() else {}
    model(input_ids=inputs, past_key_values=cache, use_cache=True, **few)
    return _prefix(cache, len(ids))


def _prefix(cache: DynamicCache, num_tokens: int) -> Prefix | None:
    if cache.get_seq_length() != num_tokens:  # the model keeps it elsewhere, or nowhere
        return None
    return Prefix(num_tokens, [(layer.keys, layer.values) for layer in cache.layers])


def shared_length(prompts: list[list[int]]) -> int:
    """Return how many tokens all prompts begin with, at most all but the last one of the shortest."""
    first, last = min(prompts), max(prompts)
    shared = sum(takewhile(bool, (a == b for a, b in zip(first, last, strict=False))))
    return min(shared, min(map(len, prompts)) - 1)


def is_copyable(model: PreTrainedModel) -> bool:
    """Return whether every layer keeps all tokens as keys and values that depend on their positions alone."""
    rope = getattr(unwrapped(model).config.get_text_config(decoder=True), "rope_parameters", None)
    by_length = any(f"'{kind}'" in str(rope) for kind in _BY_LENGTH)
    return not by_length and all(type(layer) is DynamicLayer for layer in new_cache(model).layers)
