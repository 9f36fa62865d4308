"""Score each label of a classification task by its likelihood after a record's prompt.

No head is added to the model: a label is an answer like any other, and its end token is scored too, so that
`card` and `card_lost` are compared as whole answers. The prompt ids are those of data/formatted, and a
label's ids are those that `format` writes after a prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.chat.format import ChatFormat
from capas.chat.recorded import recorded_format
from capas.core.errors import CapasError
from capas.core.records import IGNORE_INDEX
from capas.evaluation.copying import read_answers
from capas.evaluation.label_set import LabelSet
from capas.evaluation.names import LABEL, LOG_LOSS
from capas.evaluation.predictions import Row
from capas.models.architecture import num_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sequences = list[tuple[list[int], list[int]]]  # ids and labels, one entry per token


@dataclass(frozen=True)
class Candidates:
    """The labels, each with the ids and labels of its tokens and its end token, in the order of the names."""

    labels: LabelSet
    endings: Sequences

    @classmethod
    def read(
        cls, records: Sequence[Row], given: Sequence[str] | None, formatted: Path, tokenizer: Path
    ) -> "Candidates":
        """Return the labels of this run, once they are known to fit the test records.

        Args:
            records: the formatted test records.
            given: evaluation.labels.
            formatted, tokenizer: the folders data/formatted and data/models/tokenizer.

        Raises:
            CapasError: see `LabelSet.of`, `encode` and `check`.
        """
        trained = (row["reference"] for row in read_answers(formatted / "train.parquet"))
        found = cls.encode(LabelSet.of(given, trained), recorded_format(formatted, tokenizer))
        found.check(records)
        return found

    @classmethod
    def encode(cls, labels: LabelSet, chat: ChatFormat) -> "Candidates":
        """Return the labels in a chat format.

        Raises:
            CapasError: the chat template refuses a label, or the tokenizer does not distinguish two.
        """
        endings = [ending(name, chat) for name in labels.names]
        first: dict[tuple[int, ...], str] = {}
        for name, (ids, _) in zip(labels.names, endings, strict=True):
            other = first.setdefault(tuple(ids), name)
            if other != name:
                raise CapasError(
                    f"the labels {other!r} and {name!r} have the same token ids: the tokenizer does not "
                    "distinguish them. Rename one"
                )
        return cls(labels, endings)

    def check(self, records: Sequence[Row]) -> None:
        """Check the test records.

        Raises:
            CapasError: an answer is none of the labels, or `format` wrote more than the label.
        """
        names = ((f"test record {record['id']}", record["reference"]) for record in records)
        self.labels.check_known(names)
        for record in records:
            _check_written(record, self.endings[self.labels.index(record["reference"])][0])

    def check_length(self, records: Sequence[Row], limit: int | None) -> None:
        """Check that each record with the longest label fits into the positions that the model was made for.

        Args:
            limit: these positions, if the model says how many.

        Raises:
            CapasError: one does not fit.
        """
        longest = max(len(ids) for ids, _ in self.endings)
        for record in records:
            length = len(record["prompt_ids"]) + longest
            if limit is not None and length > limit:
                raise CapasError(
                    f"test record {record['id']} has {length} tokens with the longest label, but the "
                    f"model's context is {limit} tokens: shorten the prompts (dataset.max_length, with "
                    "dataset.overflow=drop or truncate)"
                )


def ending(label: str, chat: ChatFormat) -> tuple[list[int], list[int]]:
    """Return the ids of a label after a prompt, its end token included, and the labels of these tokens.

    Raises:
        CapasError: the chat template refuses it.
    """
    messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": label}]
    try:
        encoded = chat.encode(messages, "last_assistant")
    except CapasError as error:
        raise CapasError(f"the label {label!r} cannot be an answer: {error}") from None
    end = max(i for i, found in enumerate(encoded.labels) if found != IGNORE_INDEX) + 1
    answer = slice(encoded.num_prompt_tokens, end)
    return encoded.input_ids[answer], encoded.labels[answer]


def _check_written(record: Row, ids: list[int]) -> None:
    prompt = record["prompt_ids"]
    if record["input_ids"][len(prompt) : len(prompt) + len(ids)] != ids:
        raise CapasError(
            f"test record {record['id']}: its answer is more than its label {record['reference']!r} (spaces "
            "around it, a thought, a tool call, several answers in a turn, or a plain text), so the "
            "likelihoods of labels alone cannot be compared. Choose evaluation=exact_match"
        )


def answer_by_label(
    model: "PreTrainedModel",
    rows: Sequence[Row],
    records: Sequence[Row],
    candidates: Candidates,
    chat: Mapping[str, Any],
    batch_size: int,
) -> list[Row]:
    """Return the rows, each with the most probable label as its completion, and all probabilities.

    The probabilities of a record are the softmax of the log-likelihoods of its labels, whatever their length.
    Of equally probable labels the first is chosen.

    Args:
        records: the formatted records, with `prompt` as text.
        chat: chat.json of data/formatted.

    Raises:
        CapasError: a log-likelihood is not finite.
    """
    found = log_likelihoods(model, records, candidates, chat, batch_size)
    names = candidates.labels.names
    answered = []
    for row, record, logs in zip(rows, records, found.log_softmax(dim=1).tolist(), strict=True):
        right, best = candidates.labels.index(row["reference"]), logs.index(max(logs))
        answered.append(
            {
                **row,
                "prompt": record["prompt"],
                "completion": names[best],
                LABEL: best == right,
                LOG_LOSS: -logs[right],
                "label_probabilities": _probabilities(names, logs),
            }
        )
    return answered


def log_likelihoods(
    model: "PreTrainedModel",
    records: Sequence[Row],
    candidates: Candidates,
    chat: Mapping[str, Any],
    batch_size: int,
) -> Any:
    """Return the log-likelihoods of the labels after each record's prompt, [records, labels], in nats.

    Raises:
        CapasError: one is not finite, or a record is too long for the model.
    """
    from capas.evaluation.label_batches import score_labels

    candidates.check_length(records, num_positions(model.config))
    found = score_labels(model, records, candidates.endings, chat["pad_token_id"], batch_size)
    if not bool(found.isfinite().all()):
        broken = records[int((~found.isfinite()).any(dim=1).nonzero()[0, 0])]["id"]
        raise CapasError(
            f"a label of record {broken} has a likelihood that is not finite: the model is broken"
        )
    return found


def _probabilities(names: Sequence[str], logs: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"label": name, "probability": math.exp(log)} for name, log in zip(names, logs, strict=True)
    ]
