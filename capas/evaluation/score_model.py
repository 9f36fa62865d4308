"""Score a model on formatted records: its loss, and its greedy answers under the chosen metrics."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from capas.core.errors import CapasError
from capas.evaluation.copied import copied_values
from capas.evaluation.predictions import Row
from capas.evaluation.scorer import Scorer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn


def score(
    model: "nn.Module", records: list[Row], chat: Mapping[str, Any], batch_size: int
) -> list[Row]:
    """Return each record's loss in nats per supervised token, and the share of tokens that it predicts.

    Args:
        chat: chat.json of data/formatted.

    Raises:
        CapasError: a loss is not finite.
    """
    from capas.training.batches import Collator, make_example, score_examples

    collator = Collator(chat["pad_token_id"])
    examples = [make_example(record) for record in records]
    found = score_examples(model, examples, collator, batch_size).tolist()
    for record, (loss, _, _) in zip(records, found, strict=True):
        if not math.isfinite(loss):
            raise CapasError(f"the loss of record {record['id']} is {loss}: the model is broken")
    return [
        {
            **{name: record[name] for name in ("id", "metadata", "reference")},
            "loss": loss / count,
            "num_supervised_tokens": int(count),
            "token_accuracy": hits / count,
        }
        for record, (loss, hits, count) in zip(records, found, strict=True)
    ]


def answer(
    model: "nn.Module",
    rows: list[Row],
    records: list[Row],
    scorer: Scorer,
    limit: int,
    chat: Mapping[str, Any],
    tokenizer: "Tokenizer",
    batch_size: int,
) -> list[Row]:
    """Return the rows, each with a greedy completion of up to `limit` tokens and its scores."""
    from capas.evaluation.generation import complete, generation_config

    prompts = [record["prompt_ids"] for record in records]
    config = generation_config(dict(chat), limit)
    found = [group[0] for group in complete(model, prompts, config, batch_size)]
    ids = [completion.input_ids for completion in found]
    texts = tokenizer.decode_batch(ids, skip_special_tokens=False)
    controls = control_ids(chat, tokenizer)
    with_prompts = [{**row, "prompt": r["prompt"]} for row, r in zip(rows, records, strict=True)]
    return [
        {
            **row,
            "completion": text,
            **scorer.score(text, row),
            "copied_values": copied_values(text, row["reference"], row["prompt"]),
            "stopped": completion.stopped,
            "empty": not text.strip(),
            "control_token": not controls.isdisjoint(completion.input_ids),
        }
        for row, text, completion in zip(with_prompts, texts, found, strict=True)
    ]


def control_ids(chat: Mapping[str, Any], tokenizer: "Tokenizer") -> set[int]:
    """Return the control tokens that no answer should contain: all but `chat_template.allowed_tokens`."""
    added = tokenizer.get_added_tokens_decoder().items()
    return {i for i, t in added if t.special and t.content not in chat["allowed_tokens"]}
