"""The splits that fetch would make, without writing any."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.dataset.flaws import DROP, WAYS_OUT, Flaws
from capas.dataset.inspect import parts_of
from capas.dataset.pool import Pool
from capas.dataset.selection import select_records
from capas.dataset.source import sources_of
from capas.params import Params
from capas.records import SPLITS


@dataclass(frozen=True)
class Preview:
    """Records of each split; what would be dropped (duplicate, leak, ...) and how often; near-duplicates."""

    splits: dict[str, int]
    dropped: dict[str, int]
    near_duplicates: dict[str, Any] | None


def preview_splits(dataset: Params, root: Path) -> Preview:
    """Split the records as fetch would, those with a flaw left out.

    Raises:
        CapasError: a file cannot be read, or the records cannot be split as stated.
    """
    sources = sources_of(dataset, root)
    flaws = Flaws(dict.fromkeys(WAYS_OUT, DROP), 1.0)
    given: list[set[str]] = [set() for _ in sources]
    with TemporaryDirectory(prefix="capas-preview-") as folder:
        pool = Pool(Path(folder) / "everything.parquet", flaws)
        pool.fill(parts_of(sources, dataset, given, flaws))
        selection = select_records(pool, dataset, given, [source.weight for source in sources])
        return Preview(
            splits={split: int(selection.of(split).sum()) for split in SPLITS},
            dropped={reason: int(marks.sum()) for reason, marks in selection.dropped.items()},
            near_duplicates=selection.near_duplicates(),
        )
