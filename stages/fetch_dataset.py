"""Get the records and split them into train, validation and test.

Reads   nothing: the embedded task is generated from a seed
Writes  data/raw: one parquet file per split, and source.json, which says where the records come from
Params  dataset

The travelling record is born here::

    {"id": "train-00000", "metadata": {"kind": "seen", "language": "en", ...}, "messages": [
      {"role": "system", "content": "Turn the request into one function call in JSON."},
      {"role": "user", "content": "Set a timer for 99 minutes."},
      {"role": "assistant",
       "content": "{\\"name\\": \\"set_timer\\", \\"arguments\\": {\\"minutes\\": 99}}"}]}
"""

from collections.abc import Iterable, Mapping
from typing import Any

from capas.errors import CapasError
from capas.facts import write_json
from capas.params import Params
from capas.records import RAW, SPLITS, content_sha256, write_records
from capas.stage import Stage, log, run
from capas.task.calls import generate_records
from capas.validation import to_raw

EMBEDDED = "embedded"


def main(params: Params, stage: Stage) -> None:
    dataset = params.dataset
    check_source(dataset)
    splits = generate_records(
        seed=dataset.seed,
        num_train=dataset.num_train,
        num_validation=dataset.num_validation,
        num_test_per_kind=dataset.num_test_per_kind,
    )
    folder = stage.out("data/raw")
    folder.mkdir()
    source = {
        "path": dataset.path,
        "revision": dataset.revision,
        "licence": dataset.licence,
        "splits": {split: write_split(splits[split], split, folder) for split in SPLITS},
        "dropped": {},  # every generated record is kept
    }
    write_json(folder / "source.json", source)


def check_source(dataset: Params) -> None:
    """Raises CapasError where the records are to come from anything but the embedded generator."""
    if dataset.path != EMBEDDED:
        raise CapasError(
            f"dataset.path is {dataset.path!r}; this version reads no files and no hub data sets yet, a "
            f"later one will. Choose dataset.path={EMBEDDED} (the preset dataset=embedded)"
        )


def write_split(records: Iterable[Mapping[str, Any]], split: str, folder: Any) -> dict[str, Any]:
    checked = list(to_raw(EMBEDDED, split, records))
    num_records = write_records(folder / f"{split}.parquet", RAW, checked)
    log.info("%s: %d records", split, num_records)
    return {"num_records": num_records, "sha256": content_sha256(checked)}


if __name__ == "__main__":
    run("fetch", main)
