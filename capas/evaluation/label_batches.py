"""Compute the log-likelihoods of labels after prompts, in batches.

A prompt is computed once, and its keys and values are copied for each of its labels: with 20 labels of 3
tokens and prompts of 100, the model computes 180 tokens a record instead of 2,060. Models that keep more
than keys and values, or no cache, compute whole sequences.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from capas.core.progress import doing
from capas.core.records import IGNORE_INDEX
from capas.evaluation.greedy import keeps_rows_apart
from capas.evaluation.predictions import Row
from capas.evaluation.prefix import is_copyable, prefix_of
from capas.training.batches import (
    Collator,
    Example,
    batches_by_length,
    evaluating,
    make_example,
    most_tokens,
    score_examples,
    score_tokens,
)

_SEQUENCES = 2**14  # in memory at once
_MOST_COPIED = 2**30  # bytes of a prompt's copies
# Fewer labels are scored as whole sequences, in batches of several records: two forward passes for each
# record would cost more than they save. Measured on CPUs (benchmarks/labels.py --labels 3), not on a GPU.
_FEWEST, _FEWEST_ELSEWHERE = {"cpu": 4}, 16
Endings = Sequence[tuple[list[int], list[int]]]  # ids and labels of a label's tokens


def score_labels(
    model: PreTrainedModel,
    records: Sequence[Row],
    endings: Endings,
    pad_token_id: int,
    batch_size: int,
) -> torch.Tensor:
    """Return the log-likelihoods [records, endings], in nats."""
    few = len(endings) < _FEWEST.get(model.device.type, _FEWEST_ELSEWHERE)
    score = score_whole if few or not shares_prompts(model) else score_after_prompt
    step = max(1, _SEQUENCES // len(endings))
    parts = [records[start : start + step] for start in range(0, len(records), step)]
    collator = Collator(pad_token_id)
    return torch.cat([score(model, part, endings, collator, batch_size) for part in parts])


def shares_prompts(model: PreTrainedModel) -> bool:
    """Return whether the model can go on from a copy of a prompt's keys and values."""
    if not (keeps_rows_apart(model) and is_copyable(model)):
        return False
    with evaluating(model):
        return prefix_of(model, [0]) is not None


def score_after_prompt(
    model: PreTrainedModel,
    records: Sequence[Row],
    endings: Endings,
    collator: Collator,
    batch_size: int,
) -> torch.Tensor:
    """Return the log-likelihoods [records, endings], in nats, for a model that `shares_prompts`."""
    found = []
    with doing("scoring labels", len(records)) as scored, evaluating(model):
        for record in records:
            found.append(_after(model, record["prompt_ids"], endings, collator, batch_size))
            scored.step(1)
    return torch.stack(found)


def _after(
    model: PreTrainedModel,
    prompt: list[int],
    endings: Endings,
    collator: Collator,
    batch_size: int,
) -> torch.Tensor:
    """Return the log-likelihoods [endings]; each row is the prompt's last token, then an ending."""
    *begin, last = prompt
    prefix = prefix_of(model, begin) if begin else None
    if prefix:
        batch_size = max(1, min(batch_size, _MOST_COPIED // prefix.num_bytes))
    examples = [_example([last], ids, labels) for ids, labels in endings]
    lengths = [len(example["input_ids"]) for example in examples]
    found = torch.zeros(len(endings), dtype=torch.float64)
    for chosen in batches_by_length(lengths, batch_size, most_tokens(model)):
        batch = collator([examples[i] for i in chosen])
        labels = batch.pop("labels")
        whole = torch.ones(len(chosen), len(begin), dtype=torch.long)
        batch["attention_mask"] = torch.cat([whole, batch["attention_mask"]], dim=1)
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        cache = prefix.cache_of([0] * len(chosen)) if prefix else None
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits
        found[chosen] = -score_tokens(logits, labels.to(logits.device))[:, 0].cpu()
    return found


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
