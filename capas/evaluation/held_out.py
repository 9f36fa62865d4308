"""Hold the test records, and let a model answer them: by generating, by choosing a label, or not at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capas.evaluation.answer_length import answer_limit
from capas.evaluation.label_metrics import label_facts
from capas.evaluation.label_scores import Candidates, answer_by_label
from capas.evaluation.predictions import Row
from capas.evaluation.score_model import answer
from capas.evaluation.scorer import Scorer
from capas.evaluation.summary import summarize

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeldOut:
    """The test records, and what a model needs to answer them.

    Args:
        records: formatted records; with `prompt` as text if there are metrics.
        candidates: the labels to choose from; None if answers are generated.
        chat: chat.json of data/formatted.
        max_new_tokens: evaluation.max_new_tokens.
    """

    records: list[Row]
    scorer: Scorer
    candidates: Candidates | None
    chat: Mapping[str, Any]
    tokenizer: "Tokenizer"
    max_new_tokens: int | None

    @property
    def limit(self) -> int | None:
        """The tokens that a generated answer may have; None if nothing is generated."""
        if self.candidates is not None or not self.scorer.names:
            return None
        return answer_limit(self.records, self.max_new_tokens)

    def answered(
        self,
        model: "PreTrainedModel",
        rows: list[Row],
        batch_size: int,
        at: Sequence[int] | None = None,
    ) -> list[Row]:
        """Return the rows with the model's answers and their scores; without metrics as they are.

        Args:
            at: positions of the records that the rows belong to; None for all.
        """
        records = self.records if at is None else [self.records[i] for i in at]
        if self.candidates is not None:
            return answer_by_label(model, rows, records, self.candidates, self.chat, batch_size)
        if (limit := self.limit) is None:
            return rows
        return answer(
            model, rows, records, self.scorer, limit, self.chat, self.tokenizer, batch_size
        )

    def summary(self, rows: list[Row], distances: Mapping[str, str]) -> dict[str, Any]:
        """Return the summary of a model's rows.

        Args:
            distances: {id: twin, near or far}.
        """
        facts = {**summarize(rows, self.scorer.names, distances), "max_new_tokens": self.limit}
        if self.candidates is None:
            return facts
        return {**facts, **label_facts(rows, self.candidates.labels)}
