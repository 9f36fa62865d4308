"""Decode a batch greedily; rows that have ended leave it, so that the last ones do not pay for all.

`generate` runs in rounds. A round stops when a quarter of its rows have ended; the other rows go on with
their part of the KV cache. Sampling has no rounds: a draw depends on all rows of its batch.
"""

import copy
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from capas.models.coverage import unwrapped

# Layers whose state is `keys` and `values` alone. Others keep more, e.g. recurrent states, which
# `batch_select_indices` would leave as they are.
_SELECTABLE = (DynamicLayer, DynamicSlidingWindowLayer)
_KEPT_FRACTION = 0.75  # of a round's rows: it stops with so few left


def decode(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    config: GenerationConfig,
    cache: DynamicCache | None = None,
) -> list[list[int]]:
    """Return the greedy tokens of every row after its prompt; an ended row may be padded.

    Args:
        ids, mask: [rows, columns], padded on the left.
        cache: keys and values of the first columns, if they are known; it is changed.
    """
    start, limit = ids.shape[1], ids.shape[1] + config.max_new_tokens
    cache = new_cache(model) if cache is None else cache
    rows, written = torch.arange(len(ids), device=ids.device), dict[int, list[int]]()
    while True:
        ids, ended = _decode_round(model, ids, mask, config, limit - ids.shape[1], cache)
        leaving = ended | (ids.shape[1] == limit)
        written |= zip(rows[leaving].tolist(), ids[leaving, start:].tolist(), strict=True)
        if leaving.all():
            return [written[row] for row in range(len(written))]
        kept = (~leaving).nonzero()[:, 0]
        cache.batch_select_indices(kept)
        rows, ids = rows[kept], ids[kept]
        mask = torch.nn.functional.pad(mask[kept], (0, ids.shape[1] - mask.shape[1]), value=1)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache, as `generate` makes it for this model."""
    return DynamicCache(config=unwrapped(model).config.get_text_config(decoder=True))


def keeps_rows_apart(model: PreTrainedModel) -> bool:
    """Return whether rows of the model's cache can be selected; with any other cache no row leaves."""
    base: Any = unwrapped(model)
    # transformers has no public names for these two. Remote code need not set them.
    keeps_all_in_cache = base._supports_default_dynamic_cache() and not base._is_stateful
    if base.is_remote_code() or not keeps_all_in_cache:
        return False
    return all(type(layer) in _SELECTABLE for layer in new_cache(model).layers)


def _decode_round(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    config: GenerationConfig,
    max_new_tokens: int,
    cache: DynamicCache,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids with the tokens of one round, and which rows have ended."""
    config = copy.copy(config)
    config.max_new_tokens = max_new_tokens
    stops = torch.tensor(config.eos_token_id, device=ids.device)
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        past_key_values=cache,
        stopping_criteria=StoppingCriteriaList([_FewLeft(cache, stops)]),
    )
    return found, torch.isin(found[:, ids.shape[1] :], stops).any(dim=1)


class _FewLeft(StoppingCriteria):
    """Stop once a smaller batch is faster, if the other rows can go on alone."""

    def __init__(self, cache: DynamicCache, stop_token_ids: torch.Tensor) -> None:
        self.cache, self.stop_token_ids = cache, stop_token_ids
        self.ended = torch.zeros(1, dtype=torch.bool, device=stop_token_ids.device)

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        self.ended = self.ended | torch.isin(input_ids[:, -1], self.stop_token_ids)
        num_left = int((~self.ended).sum())
        is_end = num_left <= _KEPT_FRACTION * len(input_ids) and self._is_filled(input_ids)
        return torch.full((len(input_ids),), is_end, device=input_ids.device)

    def _is_filled(self, input_ids: torch.Tensor) -> bool:
        """Return whether this cache holds all but the last token: with longrope, Phi-3 starts anew."""
        return self.cache.get_seq_length() == input_ids.shape[1] - 1
