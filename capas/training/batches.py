"""Formatted records as batches, and what a model's logits say about their supervised tokens."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel

from capas.core.progress import doing
from capas.core.records import FORMATTED, IGNORE_INDEX, read_records

Example = dict[str, Any]  # input_ids [tokens], labels [tokens], id of the record


def read_examples(file: Path) -> list[Example]:
    """The records of data/formatted/{split}.parquet as tensors."""
    return [make_example(record) for record in read_records(file, FORMATTED)]


def make_example(record: dict[str, Any]) -> Example:
    tensors = {name: torch.tensor(record[name]) for name in ("input_ids", "labels")}
    return {**tensors, "id": record["id"]}


NUM_PROBED = 128  # tokens of a record that are enough to look at what a model computes


def tails(examples: list[Example]) -> list[Example]:
    """The last tokens of each, some with loss among them: whole records would take memory for nothing."""
    return [_tail(example) for example in examples]


def _tail(example: Example) -> Example:
    last, end = int((example["labels"] != IGNORE_INDEX).nonzero().max()), len(example["labels"])
    if last <= end - NUM_PROBED:  # the first token of a tail is predicted from nothing
        end = last + 1
    start = max(0, end - NUM_PROBED)
    return {**example, **{name: example[name][start:end] for name in ("input_ids", "labels")}}


class Collator:
    """Pads a batch on the right. Padding is masked by position, so the pad token may be the end token.

    Rows of several records (`packing`) have no mask: transformers sees by their positions where a
    record begins, and padding is one more record.

    Args:
        pad_token_id: what stands in the padding; nothing depends on it.
        flatten: put packed rows behind each other into one, as flash attention takes them.
    """

    def __init__(self, pad_token_id: int, flatten: bool = False) -> None:
        self.pad_token_id, self.flatten = pad_token_id, flatten

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Returns input_ids, labels, and attention_mask or position_ids: all [batch, longest]."""
        packed = "position_ids" in examples[0]
        names = ("input_ids", "labels", *(["position_ids"] if packed else []))
        if packed and self.flatten:
            return {name: torch.cat([e[name] for e in examples])[None] for name in names}
        shape = len(examples), max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        batch = {name: torch.full(shape, fill.get(name, 0)) for name in names}
        if not packed:
            batch["attention_mask"] = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            for name in names:
                batch[name][row, :length] = example[name]
            if packed:
                batch["position_ids"][row, length:] = torch.arange(shape[1] - length)
            else:
                batch["attention_mask"][row, :length] = 1
        return batch


class LengthGroupedSampler(Sampler[int]):
    """Records of similar length stand in one batch, batches in random order.

    The order is a function of seed and epoch alone. That of `transformers.LengthGroupedSampler` depends on
    torch's global generator, so that a resumed epoch sees other batches than the interrupted one.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        pool = (
            self.batch_size * 16
        )  # a batch's lengths are alike, its records still drawn at random
        batches = []
        for start in range(0, len(order), pool):
            alike = sorted(order[start : start + pool], key=lambda i: -self.lengths[i])
            batches += [
                alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)
            ]
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        rng.shuffle(batches)
        return (index for batch in batches + last for index in batch)


class Filled(Sampler[int]):
    """The records of another sampler, and at the end as often `filler` as makes all processes' batches full.

    accelerate would repeat the first records there, which would count twice.

    Args:
        order: the records of an epoch.
        multiple: records of a batch, of all processes together.
        filler: index of `make_filler` in the data set.
    """

    def __init__(self, order: Any, multiple: int, filler: int) -> None:
        self.order, self.multiple, self.filler = order, multiple, filler

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.order) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from [self.filler] * (len(self) - len(self.order))


def make_filler(example: Example) -> Example:
    """A row of one token, without loss, that is no record."""
    row = {name: e[:1] for name, e in example.items() if torch.is_tensor(e)}
    return {**row, "labels": torch.full((1,), IGNORE_INDEX), "ids": []}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, also where each process has a part (FSDP); then all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compute_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[batch, tokens, vocabulary] of a batch, as in an evaluation; the model keeps its mode."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    model.train(was_training)
    return logits


def score_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What each record's supervised tokens cost, without a second copy of the logits.

    Args:
        logits: [batch, tokens, vocabulary]; position i predicts token i + 1.
        labels: [batch, tokens]; IGNORE_INDEX where a token carries no loss.

    Returns:
        [batch, 3], float64: sum of -log p in nats, number of tokens that are the most probable one, number
        of supervised tokens.
    """
    rows, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    targets = labels[rows, positions + 1]
    predicted = logits[rows, positions].float()
    loss = torch.nn.functional.cross_entropy(predicted, targets, reduction="none")
    hits = predicted.argmax(dim=-1) == targets
    values = torch.stack(
        [loss.double(), hits.double(), torch.ones_like(loss, dtype=torch.float64)], dim=1
    )
    return torch.zeros(len(labels), 3, dtype=torch.float64, device=logits.device).index_add_(
        0, rows, values
    )


_MOST_LOGITS = 2**29 // 4  # of a scored batch, in float32


def batches_by_length(lengths: list[int], batch_size: int, most_tokens: int) -> Iterator[list[int]]:
    """Indices of records, the shortest first; a batch has one, or up to `most_tokens` with padding."""
    chosen: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if chosen and (
            len(chosen) == batch_size or (len(chosen) + 1) * lengths[index] > most_tokens
        ):
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen


def score_examples(
    model: PreTrainedModel, examples: list[Example], collator: Collator, batch_size: int
) -> torch.Tensor:
    """`score_tokens` of every record, [records, 3]; records of similar length share a batch.

    Args:
        batch_size: records in a batch; fewer where their logits would take more than half a gibibyte.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    most = _MOST_LOGITS // model.config.get_text_config().vocab_size
    scores = torch.zeros(len(examples), 3, dtype=torch.float64)
    with doing("scoring records", len(examples)) as scored:
        for chosen in batches_by_length(lengths, batch_size, most):
            batch = collator([examples[i] for i in chosen])
            logits = compute_logits(model, batch)
            scores[chosen] = score_tokens(logits, batch["labels"].to(logits.device)).cpu()
            scored.step(len(chosen))
    return scores
