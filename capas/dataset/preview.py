"""Preview fetch without writing anything, without a model or tokenizer: flaws, splits, near-duplicates."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.records import SPLITS
from capas.dataset.flaws import Flaws
from capas.dataset.inspect import Inspection, Watch, parts_of, summarise
from capas.dataset.pool import Pool
from capas.dataset.selection import select_records
from capas.dataset.source import sources_of


@dataclass(frozen=True)
class Preview:
    """The inspection of all records, and the splits of the valid ones.

    `dropped` counts the records that would be left out, by reason (duplicate, leak, ...). `problem` is the
    reason why they cannot be split as configured, and the splits are then empty.
    """

    inspection: Inspection
    splits: dict[str, int]
    dropped: dict[str, int]
    near_duplicates: dict[str, Any] | None
    problem: str | None


def preview(dataset: Params, root: Path) -> Preview:
    """Read every record once as fetch does, and split them; a record's flaw is not an error.

    Args:
        dataset: the keys of conf/dataset that fetch declares in dvc.yaml.
        root: the repository's folder.

    Raises:
        CapasError: a file or data set as a whole cannot be read, or a needed column is missing.
    """
    sources = sources_of(dataset, root)
    flaws, watch = Flaws(dataset.flaws, dataset.flaw_budget_fraction), Watch(sources)
    given: list[set[str]] = [set() for _ in sources]
    with TemporaryDirectory(prefix="capas-preview-") as folder:
        pool = Pool(Path(folder) / "everything.parquet", flaws)
        pool.read(watch.parts(parts_of(sources, dataset, given, flaws)))
        inspection = summarise(watch.found, flaws, pool.numbers)
        if not len(pool):
            problem = "no record can be used" if flaws.num_read else "there is no record"
            return _unsplit(inspection, problem)
        try:
            selection = select_records(pool, dataset, given, [source.weight for source in sources])
        except CapasError as error:
            return _unsplit(inspection, str(error))
        return Preview(
            inspection,
            splits={split: int(selection.of(split).sum()) for split in SPLITS},
            dropped={reason: int(marks.sum()) for reason, marks in selection.dropped.items()},
            near_duplicates=selection.near_duplicates(),
            problem=None,
        )


def _unsplit(inspection: Inspection, problem: str) -> Preview:
    return Preview(inspection, dict.fromkeys(SPLITS, 0), {}, None, problem)
