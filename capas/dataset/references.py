"""Read the reference answers of a user's own files, before any stage ran."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from capas.dataset.conversation import check_record
from capas.dataset.flaws import DROP, WAYS_OUT, Flaw, Flaws
from capas.dataset.message import Message
from capas.dataset.shapes import convert
from capas.dataset.source import FORMATS, Source, sources_of
from capas.errors import CapasError
from capas.params import Params

MAX_REFERENCES = 50_000
POLICIES = dict.fromkeys(WAYS_OUT, DROP)


def read_references(dataset: Params, root: Path) -> list[str]:
    """Return the last answer of each record, of at most 50,000.

    Records with a flaw are left to `fetch`; plain text has no answer.

    Raises:
        CapasError: a source is no file here, or a file cannot be read.
    """
    sources = sources_of(dataset, root)
    if elsewhere := [s.path for s in sources if s.path not in FORMATS]:
        raise CapasError(
            f"evaluation.metrics=auto looks into files of data/own, and dataset.path is {elsewhere[0]}: "
            "choose one of conf/evaluation/, as in evaluation=text"
        )
    answers = (m[-1]["content"] for m in read_messages(sources) if m[-1]["role"] == "assistant")
    return list(itertools.islice(answers, MAX_REFERENCES))


def read_messages(sources: Sequence[Source]) -> Iterator[list[Message]]:
    """Yield the messages of each record without a flaw.

    Raises:
        CapasError: a file cannot be read.
    """
    for source in sources:
        columns, roles = source.columns or {}, source.roles
        for _, rows in source.splits():
            for row in rows:
                try:
                    found = convert(row.value, source.shape_of_rows, columns, roles)
                    yield check_record(found, Flaws(POLICIES, 1.0), roles)["messages"]
                except Flaw:
                    continue
