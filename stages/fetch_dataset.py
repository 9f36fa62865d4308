"""Get the records and split them into train, validation and test.

Reads   data/own, URLs or the Hub, as dataset.path says; the embedded task is generated from a seed
Writes  data/raw: one parquet file per split, and source.json: the origin, what was dropped and why
Params  dataset

The travelling record starts here::

    {"id": "train-00000", "metadata": {"kind": "seen", "language": "en", ...}, "messages": [
      {"role": "system", "content": "Turn the request into one function call in JSON."},
      {"role": "user", "content": "Set a timer for 99 minutes."},
      {"role": "assistant",
       "content": "{\\"name\\": \\"set_timer\\", \\"arguments\\": {\\"minutes\\": 99}}"}]}
"""

from collections.abc import Iterator
from typing import Any

from capas.core.files import write_json
from capas.core.params import Params
from capas.core.records import SPLITS
from capas.core.stage import Stage, log, run
from capas.dataset.flaws import Flaws
from capas.dataset.generated import EMBEDDED
from capas.dataset.inspect import Watch, parts_of
from capas.dataset.pool import Identities, Pool
from capas.dataset.selection import Selection, select_records
from capas.dataset.source import Source, sources_of
from capas.evaluation.power import power_in_words


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
    watch = Watch(sources)
    pool.fill(watch.parts(parts_of(sources, dataset, given, flaws)))
    for found in watch.found:
        log.info("%s: %s", found.path, found.why)
    selection = select_records(pool, dataset, given, [source.weight for source in sources])
    identities = Identities(pool, selection.stays)
    splits = {}
    for split in SPLITS:
        file = folder / f"{split}.parquet"
        splits[split] = pool.write_split(file, selection.of(split), identities)
        log.info("%s: %d records", split, splits[split]["num_records"])
    facts = describe(sources, flaws, selection, splits)
    write_json(folder / "source.json", facts)
    for line in remarks(facts, dataset):
        log.info("%s", line)
    everything.unlink()


def describe(
    sources: list[Source], flaws: Flaws, selection: Selection, splits: dict[str, Any]
) -> dict[str, Any]:
    """Return the facts of source.json; those of the first source are also at the top level."""
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
        "near_duplicates": selection.near_duplicates(),
        "left_out": dict(sorted(flaws.left_out.items())),
    }


def remarks(facts: dict[str, Any], dataset: Params) -> Iterator[str]:
    """Yield what a user should know of the splits: near-duplicates, and which differences they can show."""
    found = facts["near_duplicates"]
    if found and found["num_records"]:
        yield (
            f"{found['num_records']} records are near-duplicates ({found['num_groups']} groups, the "
            f"largest has {found['largest_group']})"
        )
        if like_train := found["num_test_records_like_train"]:
            yield (
                f"{like_train} test records have a near-duplicate in train, so their score measures "
                "memorisation. dataset.split_by=cluster keeps near-duplicates in one split"
            )
    if dataset.path != EMBEDDED:
        yield power_in_words(facts["splits"][SPLITS[-1]]["num_records"])


if __name__ == "__main__":
    run("fetch", main)
