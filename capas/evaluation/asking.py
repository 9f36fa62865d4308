"""Prepare formatted records for scored answers: their prompts as text, in the format of the training."""

from typing import TYPE_CHECKING, Any

from capas.core.errors import CapasError
from capas.evaluation.scorer import Scorer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
Row = dict[str, Any]


def ask(
    records: list[Row], scorer: Scorer, tokenizer: "Tokenizer", split: str = "test"
) -> list[Row]:
    """Return the records with their prompt as text, once they are known to be fit for scoring.

    Args:
        split: the split of the records, for messages.

    Raises:
        CapasError: a prompt is not what training would see before the same answer, or a metric cannot score
            the records.
    """
    check_prompts(records, split)
    prompts = [record["prompt_ids"] for record in records]
    questions = tokenizer.decode_batch(prompts, skip_special_tokens=False)
    with_prompts = [
        {**r, "prompt": question} for r, question in zip(records, questions, strict=True)
    ]
    scorer.check(with_prompts)
    return with_prompts


def check_prompts(records: list[Row], split: str) -> None:
    """Check that the model is prompted in the format in which it was trained.

    Raises:
        CapasError: a prompt is not the beginning of its record.
    """
    for record in records:
        # The tokenizer may merge the last token of the prompt with the first one of the answer.
        sure = record["prompt_ids"][:-1]
        if record["input_ids"][: len(sure)] != sure:
            raise CapasError(
                f"data/formatted/{split}.parquet, record {record['id']}: prompt_ids is not a prefix of "
                "input_ids, so the model would be prompted in another format than it was trained "
                "in. Run `dvc repro -f format`."
            )
