"""Ask a trained model the same questions in one chat format or another, and score its answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capas.evaluation.scorer import Scorer

Record = Mapping[str, Any]  # id, reference, metadata


@dataclass(frozen=True)
class Format:
    """The questions in a chat format.

    Args:
        prompts: [records][tokens], ids that ask for the answer.
        stop_token_ids: those that end an answer in this format.
    """

    prompts: list[list[int]]
    stop_token_ids: list[int]


@dataclass(frozen=True)
class Answers:
    """One answer for each record, their mean score, and the share of those that ended by themselves."""

    completions: list[str]
    score: float
    stop_rate: float


def ask(
    model: Any,
    records: Sequence[Record],
    asked: Format,
    chat: Mapping[str, Any],
    scorer: Scorer,
    tokenizer: Any,
    max_new_tokens: int,
    batch_size: int,
) -> Answers:
    """Return the greedy answers to all records, scored by the first metric of `scorer`.

    An answer ends at an end token of the format that the model was trained in or of the one that it is asked
    in, whichever comes first: what it says counts, not how it would be cut off.

    Args:
        records: in the order of the prompts of `asked`.
        chat: data/formatted/chat.json of the training.
        tokenizer: of the package `tokenizers`.
    """
    from capas.evaluation.generation import complete, generation_config

    stops = list(dict.fromkeys([*chat["stop_token_ids"], *asked.stop_token_ids]))
    config = generation_config({**chat, "stop_token_ids": stops}, max_new_tokens)
    found = [group[0] for group in complete(model, asked.prompts, config, batch_size)]
    ids = [completion.input_ids for completion in found]
    completions = tokenizer.decode_batch(ids, skip_special_tokens=False)
    questions = tokenizer.decode_batch(asked.prompts, skip_special_tokens=False)
    metric, scores = scorer.names[0], []
    for record, question, completion in zip(records, questions, completions, strict=True):
        row = {name: record[name] for name in ("id", "reference", "metadata")}
        scores.append(float(scorer.score(completion, {**row, "prompt": question})[metric]))
    return Answers(completions, mean(scores), mean([float(one.stopped) for one in found]))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
