"""Read the reference answers of a user's own files, before any stage ran."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from capas.dataset.conversation import check_record
from capas.dataset.flaws import DROP, WAYS_OUT, Flaw, Flaws
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
    return list(itertools.islice(_references(sources), MAX_REFERENCES))


def _references(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        for _, rows in source.splits():
            for row in rows:
                flaws = Flaws(POLICIES, 1.0)
                try:
                    columns, roles = source.columns or {}, source.roles
                    found = convert(row.value, source.shape_of_rows, columns, roles)
                    messages = check_record(found, flaws, roles)["messages"]
                except Flaw:
                    continue
                if messages[-1]["role"] == "assistant":
                    yield messages[-1]["content"]
