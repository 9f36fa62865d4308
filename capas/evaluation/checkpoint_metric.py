"""Score answers to validation records while a model trains: `trainer.metric_for_best_model`.

The metric stands in the trainer group, not in `evaluation.metrics`, because it decides which weights are
kept: an edit of the evaluation retrains nothing.
"""

import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from capas.core.params import Params
from capas.core.records import FORMATTED, read_records
from capas.core.stage import Stage
from capas.evaluation import answer_budget
from capas.evaluation.answer_length import answer_limit
from capas.evaluation.asking import Row, ask
from capas.evaluation.generation import complete, generation_config
from capas.evaluation.names import name_of, needs_answers
from capas.evaluation.scorer import Scorer
from capas.models.vocabulary import check_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

log = logging.getLogger("capas")
KEY = "trainer.metric_for_best_model"
DATA, MODEL, TOKENIZER = "data/formatted", "data/models/quantized", "data/models/tokenizer"
COMPOSED = "data/composed/checkpoint_metric.json"


@dataclass(frozen=True)
class CheckpointMetric:
    """A metric of greedy answers to the same validation records at every evaluation of a training."""

    name: str
    scorer: Scorer
    records: list[Row]
    tokenizer: Tokenizer
    config: "GenerationConfig"
    batch_size: int

    def scores(self, model: "PreTrainedModel", process: int, num_processes: int) -> list[float]:
        """Return the scores of this process's share of the answers."""
        share = self.records[process::num_processes]
        prompts = [record["prompt_ids"] for record in share]
        found = complete(model, prompts, self.config, self.batch_size, tells_ahead=False)
        ids = [completions[0].input_ids for completions in found]
        texts = self.tokenizer.decode_batch(ids, skip_special_tokens=False)
        return [
            float(self.scorer.score(text, record)[self.name])
            for text, record in zip(texts, share, strict=True)
        ]

    def facts(self) -> dict[str, Any]:
        """Return the facts for reports/train.json."""
        return {
            "metric": self.name,
            "num_records": len(self.records),
            "max_new_tokens": self.config.max_new_tokens,
        }


def load_metric(
    params: Params, chat: dict[str, Any], lengths: list[int], trains_all: bool, stage: Stage
) -> CheckpointMetric | None:
    """Return the metric of answers that trainer.metric_for_best_model chooses; None if it is of tokens.

    Args:
        chat: chat.json of data/formatted.
        lengths: number of tokens in each training row.
        trains_all: whether all weights are trained.

    Raises:
        CapasError: the metric cannot be loaded or cannot score the records, or the model has no embedding
            row for a token of a prompt.
    """
    metric = params.trainer.metric_for_best_model
    if not needs_answers(metric):
        return None
    scorer = Scorer([metric], stage.dep(COMPOSED), KEY, "validation")
    tokenizer = Tokenizer.from_file(str(stage.dep(TOKENIZER) / "tokenizer.json"))
    there = ask(read_validation(chat, stage), scorer, tokenizer, "validation")
    limit = answer_limit(there, params.trainer.metric_max_new_tokens)
    records = choose_records(there, limit, lengths, trains_all, params)
    config, batch_size = generation_config(chat, limit), params.trainer.per_device_eval_batch_size
    return CheckpointMetric(name_of(metric), scorer, records, tokenizer, config, batch_size)


def read_validation(chat: dict[str, Any], stage: Stage) -> list[Row]:
    records = list(read_records(stage.dep(DATA) / "validation.parquet", FORMATTED))
    prompts = (record["prompt_ids"] for record in records)
    check_ids(prompts, (chat["pad_token_id"],), stage.dep(MODEL), stage.dep(TOKENIZER))
    return records


def choose_records(
    there: list[Row], limit: int, lengths: list[int], trains_all: bool, params: Params
) -> list[Row]:
    """Draw the records whose answers are scored, and log how many, how long, and what share of the work."""
    trainer, num_processes = params.trainer, params.hardware.num_processes
    length = sum(len(record["prompt_ids"]) for record in there) / len(there)
    size, device = trainer.per_device_eval_batch_size, params.hardware.device
    answers = answer_budget.Answers(length, limit, size, device)
    work = answer_budget.work_between(lengths, trainer, params.hardware, trains_all)
    wanted = trainer.metric_records or answer_budget.choose_number(
        answers, work, len(there), num_processes
    )
    count = min(wanted, len(there))
    fraction = answer_budget.fraction_of(answers, count, work, num_processes)
    log.info(
        "%s is scored at every evaluation, on the answers to %d of %d validation records, up to %d "
        "tokens each: by count %.0f %% of the training's work",
        name_of(trainer.metric_for_best_model), count, len(there), limit, 100 * fraction,
    )  # fmt: skip
    if trainer.metric_records is None and fraction > answer_budget.BUDGET_FRACTION:
        log.warning(
            "the answers take more than a tenth of the training's work: evaluate less often "
            "(trainer.eval_steps above %d), or shorten them (trainer.metric_max_new_tokens below %d)",
            trainer.eval_steps, limit,
        )  # fmt: skip
    chosen = random.Random(trainer.data_seed).sample(range(len(there)), count)
    return [there[i] for i in sorted(chosen)]
