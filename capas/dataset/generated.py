"""Yield the rows of a source: read from files or the Hub, or generated for the embedded task."""

from collections.abc import Iterator

from capas.core.params import Params
from capas.core.records import SPLITS
from capas.dataset.rows import Row
from capas.dataset.source import Source

EMBEDDED = "embedded"


def splits_of(source: Source, dataset: Params) -> Iterator[tuple[str, Iterator[Row]]]:
    """Yield (split, its rows) of a source; the rows of the embedded task are generated."""
    return _generated(dataset) if source.path == EMBEDDED else source.splits()


def _generated(dataset: Params) -> Iterator[tuple[str, Iterator[Row]]]:
    """Yield (split, its rows) of the embedded task."""
    from capas.dataset.task.calls import generate_records

    records = generate_records(
        seed=dataset.seed,
        num_train=dataset.num_train,
        num_validation=dataset.num_validation,
        num_test_per_kind=dataset.num_test_per_kind,
    )
    for split in SPLITS:
        found = enumerate(records[split], 1)
        yield split, (Row(EMBEDDED, f"{split} record", number, value) for number, value in found)
