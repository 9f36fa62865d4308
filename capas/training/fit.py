"""Check that a training fits, before any weight is loaded: memory, context length, embedding rows."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.stage import Stage
from capas.models.architecture import num_positions
from capas.models.vocabulary import check_ids

if TYPE_CHECKING:
    import torch

    from capas.training.batches import Example

log = logging.getLogger("capas")


def check_memory(
    train: list[int], validation: list[int], params: Params, device: "torch.device", stage: Stage
) -> None:
    """Check that the training fits into memory, before any weight is read.

    The estimate is logged, and recorded beside the measured peak. If there is none, a warning is logged.

    Args:
        train, validation: number of tokens in each row that batches are made of.

    Raises:
        CapasError: the training needs more memory than is available.
    """
    from capas.training import capacity, memory

    workload = memory.Workload.of(params.trainer, params.hardware, train, validation)
    groups = params.model, params.lora, params.trainer
    try:
        found = memory.estimate(stage.dep("data/models/quantized"), *groups, workload)
    except memory.EstimateError as error:
        log.warning("%s", error)
        return
    num_sharing = capacity.num_sharing(params.hardware)
    used, free = capacity.used_bytes(device), capacity.free_bytes(device) // num_sharing
    ways = memory.ways_out(found, workload, params.trainer)
    if num_sharing > 1:
        log.info("%d processes share the memory. Each needs:", num_sharing)
        ways.append(f"hardware.num_processes below {workload.num_processes}")
    log.info("%s", memory.summary(found, used, free))
    memory.check(found, used, free, ways)
    stage.costs |= memory.costs(found, used)


def check_lengths(folder: Path, lengths: list[int], trust_remote_code: bool) -> None:
    """Check that no record is longer than the context of the model in `folder`.

    Args:
        lengths: number of tokens in each record.

    Raises:
        CapasError: a record is longer.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    limit = num_positions(config)
    if limit is not None and max(lengths) > limit:
        raise CapasError(
            f"the longest record has {max(lengths)} tokens, but the model's context is {limit} "
            f"tokens. Set dataset.max_length={limit}, with dataset.overflow=drop or truncate"
        )


def check_tokens(
    examples: list["Example"], chat: dict[str, Any], model: Path, tokenizer: Path
) -> None:
    """Check that the model has an embedding row for each token of the records, padding and end tokens.

    Args:
        chat: chat.json of data/formatted.
        model, tokenizer: the folders of both.

    Raises:
        CapasError: tokens have no row.
    """
    ids = (example["input_ids"] for example in examples)
    others = (chat["pad_token_id"], *chat["stop_token_ids"])
    check_ids(ids, others, model, tokenizer)


def num_tokens(examples: list["Example"]) -> list[int]:
    return [len(example["input_ids"]) for example in examples]
