"""Compute the log-likelihoods of labels after prompts, in batches.

A prompt is computed once, and its keys and values are copied for each of its labels: with 20 labels of 3
tokens and prompts of 100, the model computes 180 tokens a record instead of 2,060. Models that keep more
than keys and values compute whole sequences.
"""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from capas.core.progress import doing
from capas.core.records import IGNORE_INDEX
from capas.evaluation.greedy import keeps_rows_apart
from capas.evaluation.predictions import Row
from capas.evaluation.prefix import is_copyable, prefix_of
from capas.training.batches import Collator, Example, make_example, score_examples, score_tokens

_SEQUENCES = 2**14  # in memory at once
_MOST_COPIED = 2**30  # bytes of a prompt's copies
Endings = Sequence[tuple[list[int], list[int]]]  # ids and labels of a label's tokens


def shares_prompts(model: PreTrainedModel) -> bool:
    """Return whether the model can go on from a copy of a prompt's keys and values."""
    return keeps_rows_apart(model) and is_copyable(model)


def score_labels(
    model: PreTrainedModel,
    records: Sequence[Row],
    endings: Endings,
    pad_token_id: int,
    batch_size: int,
) -> torch.Tensor:
    """Return the log-likelihoods [records, endings], in nats."""
    score = score_after_prompt if shares_prompts(model) else score_whole
    step = max(1, _SEQUENCES // len(endings))
    parts = [records[start : start + step] for start in range(0, len(records), step)]
    collator = Collator(pad_token_id)
    return torch.cat([score(model, part, endings, collator, batch_size) for part in parts])


def score_after_prompt(
    model: PreTrainedModel,
    records: Sequence[Row],
    endings: Endings,
    collator: Collator,
    batch_size: int,
) -> torch.Tensor:
    """Return the log-likelihoods [records, endings], in nats, for a model that `shares_prompts`."""
    was_training = model.training
    model.eval()
    with doing("scoring labels", len(records)) as scored, torch.inference_mode():
        parts = []
        for record in records:
            losses = _losses(model, record["prompt_ids"], endings, collator, batch_size)
            parts.append(torch.cat(list(losses)))
            scored.step(1)
    model.train(was_training)
    return -torch.stack(parts)


def _losses(
    model: PreTrainedModel,
    prompt: list[int],
    endings: Endings,
    collator: Collator,
    batch_size: int,
) -> Iterator[torch.Tensor]:
    """Yield the losses [endings of a batch]; each row is the prompt's last token, then an ending."""
    *begin, last = prompt
    prefix = prefix_of(model, begin) if begin else None
    if prefix:
        batch_size = max(1, min(batch_size, _MOST_COPIED // prefix.num_bytes))
    for start in range(0, len(endings), batch_size):
        some = endings[start : start + batch_size]
        batch = collator([_example([last], ids, labels) for ids, labels in some])
        labels = batch.pop("labels").to(model.device)
        whole = torch.ones(len(some), len(begin), dtype=torch.long)
        batch["attention_mask"] = torch.cat([whole, batch["attention_mask"]], dim=1)
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        cache = prefix.cache_of([0] * len(some)) if prefix else None
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits
        yield score_tokens(logits, labels)[:, 0].cpu()


def score_whole(
    model: PreTrainedModel,
    records: Sequence[Row],
    endings: Endings,
    collator: Collator,
    batch_size: int,
) -> torch.Tensor:
    """Return the log-likelihoods [records, endings], in nats, of whole sequences."""
    examples = [_example(r["prompt_ids"], ids, labels) for r in records for ids, labels in endings]
    losses = score_examples(model, examples, collator, batch_size)[:, 0]
    return -losses.reshape(len(records), len(endings))


def _example(prompt: list[int], ids: list[int], labels: list[int]) -> Example:
    """Return a prompt and an ending, of which the ending alone is scored."""
    ignored = [IGNORE_INDEX] * len(prompt)
    return make_example({"input_ids": [*prompt, *ids], "labels": [*ignored, *labels], "id": ""})
