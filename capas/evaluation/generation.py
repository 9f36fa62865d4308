"""Generate completions of many prompts at once, equal to those of each prompt alone.

`complete` is the only way in which stages and served models generate, so that another engine has one place.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import GenerationMode

from capas.core.errors import CapasError
from capas.core.progress import doing
from capas.evaluation.greedy import decode, keeps_rows_apart
from capas.evaluation.prefix import Prefix, shared_prefix
from capas.models.architecture import num_positions
from capas.models.coverage import unwrapped

log = logging.getLogger("capas")
# transformers' own defaults include a top_k of 50
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

_WARPERS = (
    ("repetition_penalty", 1.0, RepetitionPenaltyLogitsProcessor),
    ("temperature", 1.0, TemperatureLogitsWarper),
    ("top_k", 0, TopKLogitsWarper),
    ("top_p", 1.0, TopPLogitsWarper),
    ("min_p", 0.0, MinPLogitsWarper),
    ("typical_p", 1.0, TypicalLogitsWarper),
)


@dataclass(frozen=True)
class Completion:
    """A completion: its ids without the end token, and whether an end token stopped it."""

    input_ids: list[int]
    stopped: bool


def generation_config(
    chat: dict[str, Any], max_new_tokens: int, **settings: Any
) -> GenerationConfig:
    """Return the decoding settings with the template's tokens, and without the model's own defaults.

    Args:
        chat: data/formatted/chat.json.
        settings: keys of GenerationConfig. A missing key, or None, is not applied: no sampling, no cut-off.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    neutral = _NEUTRAL if settings.get("do_sample") else {"do_sample": False}
    return GenerationConfig(
        bos_token_id=chat["bos_token_id"],
        eos_token_id=chat["stop_token_ids"],
        pad_token_id=chat["pad_token_id"],
        max_new_tokens=max_new_tokens,
        **{**neutral, **settings},
    )


def complete(
    model: PreTrainedModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    batch_size: int,
    tells_ahead: bool = True,
) -> list[list[Completion]]:
    """Return `config.num_return_sequences` completions of every prompt, in the order of the prompts.

    Prompts of similar length share a batch. They are padded on the left, so that all of them end where the
    model continues; padding is masked by position. The longest come first: a batch that does not fit into
    memory fails at once, and the time that is logged after the first batch is rather too long than too short.
    A greedy batch loses the rows that have ended (`greedy`), and computes what all prompts begin with once
    (`prefix`). With a `batch_size` of 1 each prompt is decoded as `generate` does it.

    Args:
        prompts: [prompts][tokens], ids.
        tells_ahead: log the expected time after the first batch.

    Raises:
        CapasError: see `check_positions`.
    """
    check_positions(model, prompts, config.max_new_tokens)
    _forget_defaults(model)
    rows_leave = batch_size > 1 and _is_greedy(config) and keeps_rows_apart(model)
    prefix = shared_prefix(model, prompts, config) if rows_leave else None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, list[Completion]] = {}
    started = time.perf_counter()
    with doing("answering prompts", len(order)) as answered:
        for start in reversed(range(0, len(order), batch_size)):
            chosen = order[start : start + batch_size]
            batch = [prompts[i] for i in chosen]
            found = (
                _complete_greedily(model, batch, config, prefix)
                if rows_leave
                else _complete_batch(model, batch, config)
            )
            if tells_ahead and not completions and len(chosen) < len(order):
                num_batches = -(-len(order) // batch_size)
                _tell_ahead((time.perf_counter() - started) * num_batches, len(order))
            completions.update(zip(chosen, found, strict=True))
            answered.step(len(chosen))
    return [completions[i] for i in range(len(prompts))]


def check_positions(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Check that the longest prompt and its answer fit into the positions that the model was made for.

    Beyond them a table of positions has no row, and rotary positions give nonsense.

    Raises:
        CapasError: they do not fit; the message gives the largest max_new_tokens that does.
    """
    limit = num_positions(model.config)
    longest = max(map(len, prompts), default=0)
    if limit is None or longest + max_new_tokens <= limit:
        return
    way = (
        f"set max_new_tokens={limit - longest} (evaluation.max_new_tokens, generation.max_new_tokens, "
        "trainer.metric_max_new_tokens)"
        if longest < limit
        else "shorten the prompts (dataset.max_length, with dataset.overflow=drop or truncate)"
    )
    raise CapasError(
        f"prompt {[len(p) for p in prompts].index(longest) + 1} of {len(prompts)} has {longest} "
        f"tokens and its answer may have {max_new_tokens}, but the model's context is {limit} "
        f"tokens: {way}"
    )


def _tell_ahead(seconds: float, num_prompts: int) -> None:
    """Log the expected time. A batch takes about as long with few prompts, so the first one may be small."""
    whole = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    log.info("%.3g seconds per record: about %s for %d", seconds / num_prompts, whole, num_prompts)


def next_token_probabilities(
    logits: torch.Tensor, input_ids: list[int], settings: dict[str, Any]
) -> torch.Tensor:
    """Return the model's distribution under a sampling setting, applied in the order of `generate`.

    Args:
        logits: [vocabulary].
        input_ids: all tokens so far, prompt included; repetition_penalty lowers their probabilities.
        settings: keys of `_WARPERS`; each may be missing or None.

    Returns:
        [vocabulary], sums to 1.
    """
    scores, so_far = logits[None].float(), torch.tensor([input_ids])
    for name, neutral, warper in _WARPERS:
        if settings.get(name) not in (None, neutral):
            scores = warper(settings[name])(so_far, scores)
    return scores.softmax(dim=-1)[0]


def pad_left(prompts: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input_ids and attention_mask, both [prompts, longest], padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _forget_defaults(model: PreTrainedModel) -> None:
    """Drop the model's generation_config.json: `generate` takes missing keys from it, e.g. a top_k of 20."""
    for owner in {model, unwrapped(model)}:
        owner.generation_config = GenerationConfig()


def _is_greedy(config: GenerationConfig) -> bool:
    return config.get_generation_mode() == GenerationMode.GREEDY_SEARCH


def _complete_greedily(
    model: PreTrainedModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    prefix: Prefix | None,
) -> list[list[Completion]]:
    ids, mask = (t.to(model.device) for t in pad_left(prompts, config.pad_token_id))
    cache = prefix.cache_of([ids.shape[1] - len(p) for p in prompts]) if prefix else None
    with torch.inference_mode():
        rows = decode(model, ids, mask, config, cache)
    return [[_until_stop(row, config.eos_token_id)] for row in rows]


def _complete_batch(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig
) -> list[list[Completion]]:
    ids, mask = (t.to(model.device) for t in pad_left(prompts, config.pad_token_id))
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    written = [_until_stop(row, config.eos_token_id) for row in output[:, ids.shape[1] :].tolist()]
    count = config.num_return_sequences or 1
    return [written[i : i + count] for i in range(0, len(written), count)]


def _until_stop(ids: list[int], stop_token_ids: list[int]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in stop_token_ids), None)
    return Completion(ids[:end], stopped=end is not None)
