"""Read the reference answers in a user's own files, before any stage has run."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.dataset.conversation import check_record
from capas.dataset.flaws import DROP, WAYS_OUT, Flaw, Flaws
from capas.dataset.generated import splits_of
from capas.dataset.message import Message
from capas.dataset.shapes import convert
from capas.dataset.source import FORMATS, sources_of

MAX_REFERENCES = 50_000
POLICIES = dict.fromkeys(WAYS_OUT, DROP)


def read_references(dataset: Params, root: Path) -> list[str]:
    """Return the last answers of at most 50,000 records.

    Records with a flaw are left to `fetch`; plain text has no answer.

    Raises:
        CapasError: a source does not consist of files, or a file cannot be read.
    """
    if elsewhere := [s.path for s in sources_of(dataset, root) if s.path not in FORMATS]:
        raise CapasError(
            f"evaluation.metrics=auto needs files in data/own, but dataset.path is {elsewhere[0]}. "
            "Choose one of conf/evaluation/, e.g. evaluation=text"
        )
    messages = read_messages(dataset, root)
    answers = (m[-1]["content"] for m in messages if m[-1]["role"] == "assistant")
    return list(itertools.islice(answers, MAX_REFERENCES))


def read_messages(dataset: Params, root: Path) -> Iterator[list[Message]]:
    """Yield the messages of each record without a flaw.

    Raises:
        CapasError: a file cannot be read.
    """
    for source in sources_of(dataset, root):
        columns, roles = source.columns or {}, source.roles
        for _, rows in splits_of(source, dataset):
            for row in rows:
                try:
                    found = convert(row.value, source.shape_of_rows, columns, roles)
                    yield check_record(found, Flaws(POLICIES, 1.0), roles)["messages"]
                except Flaw:
                    continue
