"""Put the chat template around the messages and mark what is trained.

Reads   data/tokenized, data/models/tokenizer, data/composed/chat_template.jinja
Writes  data/formatted: ids and labels per record, chat.json (end token, ...) and the template;
        reports/format.json, reports/lengths.csv; reports/mask.html and mask.es.html, which show token by
        token what is trained
Params  chat_template, dataset, model.pad_token

The travelling record becomes ids; only the answer and its end token keep their label::

    input_ids  <|im_start|> assistant \\n  {"name": "set_timer", "arguments": {"minutes": 99}} <|im_end|> \\n
    labels             -100      -100 -100 {"name": "set_timer", "arguments": {"minutes": 99}} <|im_end|> -100
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from capas.chat.batch import Formatted
from capas.chat.format import ChatFormat
from capas.chat.formatting import Refused, SplitFormatter, histogram
from capas.chat.overflow import Overflow, check_overflow
from capas.chat.reference import compare
from capas.chat.tokenizer import MODEL_TEMPLATE
from capas.core.errors import CapasError
from capas.core.files import write_csv, write_json
from capas.core.params import Params
from capas.core.progress import counted
from capas.core.records import FORMATTED, SPLITS, TOKENIZED, read_batches, write_tables
from capas.core.stage import Stage, log, run
from capas.report.mask.page import Sampler, write_mask_pages

TEMPLATE = "data/composed/chat_template.jinja"


def main(params: Params, stage: Stage) -> None:
    chat = load_format(params, stage)
    folder = stage.out("data/formatted")
    folder.mkdir()
    formatters = {split: make_formatter(split, chat, params) for split in SPLITS}
    samplers = {split: Sampler(chat) for split in SPLITS}
    num_records: dict[str, int] = {}
    for split in SPLITS:
        batches = read_batches(stage.dep("data/tokenized") / f"{split}.parquet", TOKENIZED)
        formatted = sampled(formatters[split].format(batches), samplers[split])
        file = folder / f"{split}.parquet"
        num_records[split] = write_tables(file, FORMATTED, counted(formatted, f"{split} records"))
        log.info("%s: %d records", split, num_records[split])
    check_overflow(formatter.overflow for formatter in formatters.values())
    if empty := [split for split in SPLITS if not num_records[split]]:
        raise CapasError(
            f"no {' and no '.join(empty)} record is left: see dataset.max_length, dataset.overflow and "
            "chat_template.refused"
        )

    num_compared = compare(chat, {split: formatters[split].sample for split in SPLITS})
    log.info("%d records equal those of transformers' apply_chat_template", num_compared)
    write_chat(folder, chat, params, stage)
    facts = summary(formatters, chat, params)
    write_json(stage.out("reports/format.json"), facts)
    write_json(stage.out("reports/metrics/format.json"), headline(facts))
    lengths = {split: formatter.lengths for split, formatter in formatters.items()}
    columns = ("split", "num_tokens", "num_records")
    write_csv(stage.out("reports/lengths.csv"), columns, histogram(lengths))
    samples = {split: sampler.chosen() for split, sampler in samplers.items()}
    pages = {"en": stage.out("reports/mask.html"), "es": stage.out("reports/mask.es.html")}
    write_mask_pages(pages, samples, facts, chat)


def headline(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that `dvc metrics show` shows: the training split, and what any split lost."""
    splits = facts["splits"]
    return {
        "num_train_tokens": splits["train"]["num_tokens"],
        "supervised_fraction": splits["train"]["supervised_fraction"],
        "num_truncated": sum(split["truncated"] for split in splits.values()),
        "num_dropped": sum(facts["dropped"].values()),
    }


def load_format(params: Params, stage: Stage) -> ChatFormat:
    options = params.chat_template
    own = options.path.partition(":")[0] == MODEL_TEMPLATE
    chat = ChatFormat.load(
        None if own else stage.dep(TEMPLATE).read_text(encoding="utf-8"),
        stage.dep("data/models/tokenizer"),
        options.date_string,
        options.system,
        options.allowed_tokens,
        options.path,
    )
    if chat.doubles_bos:
        log.warning(
            "chat_template.path=%s writes bos_token twice; the template probably has one too many",
            options.path,
        )
    return chat


def make_formatter(split: str, chat: ChatFormat, params: Params) -> SplitFormatter:
    dataset, options = params.dataset, params.chat_template
    budget = dataset.overflow_budget_fraction
    overflow = Overflow(split, dataset.max_length, dataset.overflow, budget, chat.end_token_ids)
    refused = Refused(options.refused, options.refused_budget_fraction)
    return SplitFormatter(split, chat, options.train_on, overflow, refused)


def sampled(batches: Iterable[Formatted], sampler: Sampler) -> Iterator[pa.Table]:
    for formatted in batches:
        sampler.look(formatted)
        yield pa.Table.from_batches([formatted.records])


def write_chat(folder: Path, chat: ChatFormat, params: Params, stage: Stage) -> None:
    """Write the facts on the format that later stages need, and the template itself."""
    template, options = chat.template_text.encode(), params.chat_template
    (folder / "chat_template.jinja").write_bytes(template)
    facts = {
        "system": options.system,
        "date_string": options.date_string,
        "allowed_tokens": options.allowed_tokens,
        "template_sha256": hashlib.sha256(template).hexdigest(),
        "bos_token_id": chat.bos_token_id,
        "pad_token_id": pad_token_id(chat, params.model.pad_token),
        "end_token": chat.end_token,
        "end_token_id": chat.end_token_id,
        "stop_token_ids": chat.stop_token_ids,
        "probes_sha256": chat.probes_sha256(),
    }
    write_json(folder / "chat.json", facts)


def pad_token_id(chat: ChatFormat, pad_token: str | None) -> int:
    """Return the id of `model.pad_token`; if it is null, of the tokenizer's own, or else of its end token.

    Raises:
        CapasError: the tokenizer has no such token.
    """
    if pad_token is None:
        return chat.pad_token_id
    found: int | None = chat.tokenizer.token_to_id(pad_token)
    if found is None:
        raise CapasError(
            f"model.pad_token={pad_token!r}: the tokenizer has no such token. Set "
            "model.pad_token=null, which uses an existing token; padding is masked by position "
            "anyway"
        )
    return found


def summary(
    formatters: dict[str, SplitFormatter], chat: ChatFormat, params: Params
) -> dict[str, Any]:
    too_long = sum(formatter.overflow.dropped for formatter in formatters.values())
    refused = sum(formatter.refused.count for formatter in formatters.values())
    example = chat.example()
    dropped = {"longer than dataset.max_length": too_long, "refused by the template": refused}
    return {
        "splits": {split: formatter.facts() for split, formatter in formatters.items()},
        "dropped": {why: count for why, count in dropped.items() if count},
        "refused": [e for formatter in formatters.values() for e in formatter.refused.examples],
        "example": {"input_ids": example.input_ids, "labels": example.labels},
        "end_token": chat.end_token,
        "chat_template": PurePosixPath(params.chat_template.path).stem,
        "train_on": params.chat_template.train_on,
        "system": params.chat_template.system,
    }


if __name__ == "__main__":
    run("format", main)
