"""Get the records and split them into train, validation and test.

Reads   data/own, URLs or the Hub, whatever dataset.path names; the embedded task is generated from a seed
Writes  data/raw: one parquet file per split, and source.json: where they come from, what was dropped and why
Params  dataset

The travelling record is born here::

    {"id": "train-00000", "metadata": {"kind": "seen", "language": "en", ...}, "messages": [
      {"role": "system", "content": "Turn the request into one function call in JSON."},
      {"role": "user", "content": "Set a timer for 99 minutes."},
      {"role": "assistant",
       "content": "{\\"name\\": \\"set_timer\\", \\"arguments\\": {\\"minutes\\": 99}}"}]}
"""

from collections.abc import Iterator
from typing import Any

from capas.dataset.flaws import Flaws
from capas.dataset.pool import Identities, Part, Pool
from capas.dataset.rows import Row
from capas.dataset.selection import Selection, select_records
from capas.dataset.source import Source, sources_of
from capas.facts import write_json
from capas.params import Params
from capas.records import SPLITS
from capas.stage import Stage, log, run
from capas.task.calls import generate_records

EMBEDDED = "embedded"


def main(params: Params, stage: Stage) -> None:
    dataset = params.dataset
    stage.dep("data/own")
    sources = sources_of(dataset, stage.root)
    flaws = Flaws(dataset.flaws, dataset.flaw_budget_fraction)
    folder = stage.out("data/raw")
    folder.mkdir()
    everything = folder / "everything.parquet"
    pool = Pool(everything, flaws)
    given: list[set[str]] = [set() for _ in sources]
    pool.fill(parts_of(sources, dataset, given, flaws))
    selection = select_records(pool, dataset, given, [source.weight for source in sources])
    identities = Identities(pool, selection.stays)
    splits = {}
    for split in SPLITS:
        file = folder / f"{split}.parquet"
        splits[split] = pool.write_split(file, selection.of(split), identities)
        log.info("%s: %d records", split, splits[split]["num_records"])
    write_json(folder / "source.json", describe(sources, flaws, selection, splits))
    everything.unlink()


def parts_of(
    sources: list[Source], dataset: Params, given: list[set[str]], flaws: Flaws
) -> Iterator[tuple[Part, Iterator[Row]]]:
    """Every split of every source, and its rows.

    `given` gets the names of the splits, `flaws` the columns that were not read.
    """
    for number, source in enumerate(sources):
        splits = generated(dataset) if source.path == EMBEDDED else source.splits()
        for split, rows in splits:
            given[number].add(split)
            code, columns = SPLITS.index(split), source.columns or {}
            log.info("%s: reading %s", source.path, split)
            shape = source.shape_of_rows
            yield Part(number, code, shape, columns, source.system, source.roles), rows
        for column, count in source.unread().items():
            flaws.leave_out(column, count)


def generated(dataset: Params) -> Iterator[tuple[str, Iterator[Row]]]:
    """The embedded task's records as rows."""
    records = generate_records(
        seed=dataset.seed,
        num_train=dataset.num_train,
        num_validation=dataset.num_validation,
        num_test_per_kind=dataset.num_test_per_kind,
    )
    for split in SPLITS:
        found = enumerate(records[split], 1)
        yield split, (Row(EMBEDDED, f"{split} record", number, value) for number, value in found)


def describe(
    sources: list[Source], flaws: Flaws, selection: Selection, splits: dict[str, Any]
) -> dict[str, Any]:
    """The facts of source.json; the first source's stand at the top as well."""
    first = sources[0]
    flawed = {
        kind: {"count": count, "examples": flaws.examples[kind]}
        for kind, count in sorted(flaws.dropped.items())
    }
    return {
        "path": first.path,
        "revision": first.revision,
        "licence": first.licence,
        "sources": [
            {**source.facts(), "num_records": selection.num_of(number)}
            for number, source in enumerate(sources)
        ],
        "num_read": flaws.num_read,
        "splits": splits,
        "dropped": {**flawed, **selection.facts()},
        "repaired": {
            kind: {"count": count, "policy": flaws.policy(kind)}
            for kind, count in sorted(flaws.repaired.items())
        },
        "kept": selection.kept,
        "left_out": dict(sorted(flaws.left_out.items())),
    }


if __name__ == "__main__":
    run("fetch", main)
