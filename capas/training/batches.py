"""Make batches of formatted records, and score the supervised tokens by a model's logits."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Return the records of data/formatted/{split}.parquet as tensors."""
    return [make_example(record) for record in read_records(file, FORMATTED)]


def make_example(record: dict[str, Any]) -> Example:
    tensors = {name: torch.tensor(record[name]) for name in ("input_ids", "labels")}
    return {**tensors, "id": record["id"]}


NUM_PROBED = 128  # tokens of a record that suffice to check what a model computes


def tails(examples: list[Example]) -> list[Example]:
    """Return up to NUM_PROBED tokens from the end of each record, with supervised ones among them.

    Whole records would only take more memory.
    """
    return [_tail(example) for example in examples]


def _tail(example: Example) -> Example:
    last, end = int((example["labels"] != IGNORE_INDEX).nonzero().max()), len(example["labels"])
    if last <= end - NUM_PROBED:  # nothing predicts the first token of a tail
        end = last + 1
    start = max(0, end - NUM_PROBED)
    return {**example, **{name: example[name][start:end] for name in ("input_ids", "labels")}}


class Collator:
    """A collator that pads batches on the right.

    Padding is masked by position, so the pad token may be the end token. Packed rows (`packing`) have no
    mask: transformers sees by the positions where a record begins, and padding counts as one more record.

    Args:
        pad_token_id: the id of padding tokens; no result depends on it.
        flatten: join packed rows into a single one, as flash attention expects.
    """

    def __init__(self, pad_token_id: int, flatten: bool = False) -> None:
        self.pad_token_id, self.flatten = pad_token_id, flatten

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Return input_ids, labels, and attention_mask or position_ids.

        All are [batch, longest]; flattened rows are [1, tokens of all].
        """
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
    """A sampler that puts records of similar length into one batch, and the batches into random order.

    The order depends on seed and epoch alone. In `transformers.LengthGroupedSampler` it depends on torch's
    global generator, so that a resumed epoch would see other batches than the interrupted one.
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
        # lengths in a batch are similar, but its records are still drawn at random
        pool = self.batch_size * 16
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
    """A sampler that repeats `filler` after the records of another sampler, until all batches are full.

    accelerate would repeat the first records instead, which would then count twice.

    Args:
        order: the sampler of an epoch's records.
        multiple: number of records in a batch of all processes together.
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
    """Return a row of one token without loss that belongs to no record."""
    row = {name: e[:1] for name, e in example.items() if torch.is_tensor(e)}
    return {**row, "labels": torch.full((1,), IGNORE_INDEX), "ids": []}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, gathered (a collective call) if each process holds a shard of it (FSDP)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the model into eval mode, without gradients, and restore its mode."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        yield
    model.train(was_training)


def compute_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits [batch, tokens, vocabulary] in eval mode; the model's mode is restored."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    with evaluating(model):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


def score_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Score the supervised tokens of each record, without a second copy of the logits.

    Args:
        logits: [batch, tokens, vocabulary]; position i predicts token i + 1.
        labels: [batch, tokens]; IGNORE_INDEX for a token without loss.

    Returns:
        [batch, 3], float64: the sum of -log p in nats, the number of tokens that are the most probable one,
        and the number of supervised tokens.
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


_MOST_LOGITS = 2**29 // 4  # logits of a scored batch: half a gibibyte in float32


def most_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens a scored batch may have."""
    found: int = _MOST_LOGITS // model.config.get_text_config().vocab_size
    return found


def batches_by_length(lengths: list[int], batch_size: int, most_tokens: int) -> Iterator[list[int]]:
    """Yield batches of record indices, the shortest records first.

    A batch has up to `batch_size` records and up to `most_tokens` tokens with padding, but at least one
    record.
    """
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
    """Return `score_tokens` of every record, [records, 3]; records of similar length share a batch.

    Args:
        batch_size: records in a batch; fewer if their logits would take more than half a gibibyte.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    scores = torch.zeros(len(examples), 3, dtype=torch.float64)
    with doing("scoring records", len(examples)) as scored:
        for chosen in batches_by_length(lengths, batch_size, most_tokens(model)):
            batch = collator([examples[i] for i in chosen])
            logits = compute_logits(model, batch)
            scores[chosen] = score_tokens(logits, batch["labels"].to(logits.device)).cpu()
            scored.step(len(chosen))
    return scores
