"""Ask a trained model the same questions in several chat formats, and score its answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capas.evaluation.scorer import Scorer

Record = Mapping[str, Any]  # id, reference, metadata


@dataclass(frozen=True)
class Format:
    """The questions in a chat format.

    Args:
        prompts: [records][tokens], ids of the prompts.
        stop_token_ids: the tokens that end an answer in this format.
    """

    prompts: list[list[int]]
    stop_token_ids: list[int]


@dataclass(frozen=True)
class Answers:
    """One answer for each record, their mean score, and the share of answers that ended by themselves."""

    completions: list[str]
    score: float
    stop_rate: float


def ask(
    model: Any,
    records: Sequence[Record],
    prompt_format: Format,
    chat: Mapping[str, Any],
    scorer: Scorer,
    tokenizer: Any,
    max_new_tokens: int,
    batch_size: int,
) -> Answers:
    """Return the greedy answers to all records, scored by the first metric of `scorer`.

    An answer ends at an end token of the training's format or of the format in which the model is asked,
    whichever comes first. So an answer is scored by its text, not by where it would be cut off.

    Args:
        records: the records, in the order of the prompts of `prompt_format`.
        chat: data/formatted/chat.json of the training.
        tokenizer: a tokenizer of the package `tokenizers`.
    """
    from capas.evaluation.generation import complete, generation_config

    stops = list(dict.fromkeys([*chat["stop_token_ids"], *prompt_format.stop_token_ids]))
    config = generation_config({**chat, "stop_token_ids": stops}, max_new_tokens)
    found = [group[0] for group in complete(model, prompt_format.prompts, config, batch_size)]
    ids = [completion.input_ids for completion in found]
    completions = tokenizer.decode_batch(ids, skip_special_tokens=False)
    questions = tokenizer.decode_batch(prompt_format.prompts, skip_special_tokens=False)
    metric, scores = scorer.names[0], []
    for record, question, completion in zip(records, questions, completions, strict=True):
        row = {name: record[name] for name in ("id", "reference", "metadata")}
        scores.append(float(scorer.score(completion, {**row, "prompt": question})[metric]))
    return Answers(completions, mean(scores), mean([float(one.stopped) for one in found]))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
