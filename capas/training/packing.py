"""Pack several records into one row: batches have almost no padding, and no record sees another."""

import bisect
import logging
from typing import Any

import torch

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.records import IGNORE_INDEX
from capas.models.coverage import quantized_linears
from capas.models.loading import quantization_method
from capas.training.batches import Collator, Example, compute_logits
from capas.training.fit import num_tokens

log = logging.getLogger("capas")
# The largest difference of logits, as a fraction of the largest logit, that rounding alone may cause.
_ROUNDING = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
_INT8_ROUNDING = 5e-2  # int8 layers choose by the whole batch which columns they do not round


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return rows of at most `capacity` tokens, packed by best fit decreasing (Johnson 1974).

    The longest record comes first; each goes into the row where it leaves the least space.

    Returns:
        Indices of `lengths`, ascending in each row; rows in the order of their first record.

    Raises:
        CapasError: a record is longer than a row.
    """
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > capacity:
        raise CapasError(
            f"trainer.packing_length={capacity}, but the longest training record has {lengths[longest]} "
            f"tokens: set at least that, or dataset.max_length={capacity}"
        )
    rows: dict[int, list[list[int]]] = {}  # by the space left in them
    left: list[int] = []  # the keys of `rows`, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(left, lengths[index])
        if at == len(left):
            space, row = capacity, []
        else:
            space = left[at]
            row = rows[space].pop()
            if not rows[space]:
                del rows[space], left[at]
        row.append(index)
        space -= lengths[index]
        if space not in rows:
            bisect.insort(left, space)
        rows.setdefault(space, []).append(row)
    return sorted(sorted(row) for group in rows.values() for row in group)


def pack(examples: list[Example], capacity: int) -> list[Example]:
    """Pack records into rows.

    Positions restart at each record, and no record predicts the first token of the next one.

    Returns:
        Rows with input_ids, labels, position_ids [tokens of the row] and the `ids` of the records.

    Raises:
        CapasError: see `best_fit_decreasing`.
    """
    chosen = best_fit_decreasing(num_tokens(examples), capacity)
    return [join([examples[i] for i in of_row]) for of_row in chosen]


def join(examples: list[Example]) -> Example:
    """Join several records into one row."""
    first = torch.full((1,), IGNORE_INDEX)
    parts = {
        "input_ids": [example["input_ids"] for example in examples],
        "labels": [part for e in examples for part in (first, e["labels"][1:])],
        "position_ids": [torch.arange(len(example["input_ids"])) for example in examples],
    }
    joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return {**joined, "ids": [example["id"] for example in examples]}


def check_isolation(
    model: Any, examples: list[Example], rows: list[Example], collator: Collator, num_rows: int = 2
) -> float:
    """Check on real records that a packed record gets the same logits as it gets alone.

    Args:
        examples: the records.
        rows: the same records, packed; the rows with the most records are tried.
        num_rows: number of rows in the batch that is tried.

    Returns:
        The largest difference, as a fraction of the largest logit.

    Raises:
        CapasError: the difference is more than rounding: the model attends across records.
    """
    fullest = sorted(rows, key=lambda row: -len(row["ids"]))[:num_rows]
    known = {example["id"]: example for example in examples}
    largest = difference = 0.0
    logits = compute_logits(model, collator(fullest))
    for record_id, packed in _each_record(fullest, logits, flat=collator.flatten):
        alone = compute_logits(model, collator([known[record_id]]))[0].float()
        difference = max(difference, float((packed.float() - alone).abs().max()))
        largest = max(largest, float(alone.abs().max()))
    part, allowed = difference / largest, _allowed(model)
    if not part <= allowed:  # true for NaN, too
        raise CapasError(
            "packed records attend to each other: logits differ from the unpacked record by "
            f"{part:.3g} of the largest logit; rounding explains at most {allowed:g}. A "
            f"{model.config.model_type} model with "
            f"model.attn_implementation={model.config._attn_implementation} cannot be packed. Set "
            "trainer.packing_length=null, or another attn_implementation"
        )
    return part


def _each_record(rows: list[Example], logits: torch.Tensor, flat: bool) -> Any:
    """Yield (id, logits [tokens, vocabulary]) of each record in a batch of rows."""
    before = 0
    for index, row in enumerate(rows):
        positions = row["position_ids"]
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        of_row = logits[0, before:] if flat else logits[index]
        for record_id, start, end in zip(row["ids"], starts[:-1], starts[1:], strict=True):
            yield record_id, of_row[start:end]
        before += len(positions)


def _allowed(model: Any) -> float:
    """Return the rounding of the coarsest dtype in which the model computes; 4-bit layers have their own."""
    layers = [getattr(layer, "compute_dtype", None) for _, layer in quantized_linears(model)]
    dtypes = {str(d).removeprefix("torch.") for d in {model.dtype, *filter(None, layers)}}
    if model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        dtypes.add("tf32")  # 10 bits of precision, like float16
    rounding = max(_ROUNDING[dtype] for dtype in dtypes)
    return max(rounding, _INT8_ROUNDING) if quantization_method(model) == "int8" else rounding


def prove_packing(
    model: Any,
    train: list[Example],
    rows: list[Example],
    collator: Collator,
    trainer: Params,
) -> dict[str, Any] | None:
    """Check that packed records do not see each other; return the facts, None if nothing is packed.

    Raises:
        CapasError: packed records see each other.
    """
    if trainer.packing_length is None:
        return None
    log.info("%d records in %d rows of %d tokens", len(train), len(rows), trainer.packing_length)
    num_rows = min(2, trainer.per_device_train_batch_size)
    return {
        "num_records": len(train),
        "num_rows": len(rows),
        "filled_fraction": sum(num_tokens(train)) / (len(rows) * trainer.packing_length),
        "isolation_difference": check_isolation(model, train, rows, collator, num_rows),
    }
