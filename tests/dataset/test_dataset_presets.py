"""The presets of hub data sets, each on a repository with the columns of the real one."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from dataside import DataSide
from hub import Hub, use

from capas.config.composition import composer
from capas.core.dag import read_yaml

NUM_ROWS = 200
VECTORS = {"input": [0.5], "instruction": [0.25], "output": [0.125]}


def tree_row(number: int, split: str) -> dict[str, Any]:
    """A question and two answers for each tree; the better one comes second."""
    tree, place = divmod(number, 3)
    row = {
        "message_id": f"{split}-{tree}-{place}",
        "parent_id": f"{split}-{tree}-0" if place else None,
    }
    role = "assistant" if place else "prompter"
    rank = {0: None, 1: 1, 2: 0}[place]
    about = {"deleted": False, "lang": "es", "labels": {"name": ["spam"], "value": [0.5]}}
    return {**row, "role": role, "text": f"{split} text {number}", "rank": rank, **about}


ROWS: dict[str, Any] = {
    "alpaca": lambda n, split: {
        **{"instruction": f"Do {n}", "input": f"with {n}" if n % 2 else "", "output": f"Done {n}"},
        "text": f"Below is an instruction {n}",
    },
    "dolly": lambda n, split: {
        **{
            "instruction": f"Do {n}",
            "context": f"about {n}" if n % 2 else "",
            "response": f"So {n}",
        },
        "category": "open_qa",
    },
    "oasst": tree_row,
    "ultrachat": lambda n, split: {
        **{"prompt": f"Hi {split} {n}", "prompt_id": f"{split}{n}"},
        "messages": [
            {"role": "user", "content": f"Hi {split} {n}"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": f"Because {n}"},
        ],
    },
    "gsm8k": lambda n, split: {"question": f"{split} {n}+1?", "answer": f"<<1>>\n#### {n + 1}"},
    "somos-clean-alpaca-es": lambda n, split: {
        **{"text": None, "id": f"id{n}", "metadata": {"tr-flag-1-instruction": False}},
        "inputs": {"1-instruction": f"Haz {n}", "2-input": "", "3-output": f"Hecho {n}"},
        **{"prediction": None, "vectors": VECTORS, "multi_label": False, "status": "Default"},
    },
}
EXPECTED = {
    "alpaca": ["Do 1\n\nwith 1", "Done 1"],
    "dolly": ["Do 1\n\nabout 1", "So 1"],
    "oasst": ["train text 3", "train text 5"],
    "ultrachat": ["Hi train 1", "Hello", "Why?", "Because 1"],
    "gsm8k": ["train 1+1?", "<<1>>\n#### 2"],
    "somos-clean-alpaca-es": ["Haz 1", "Hecho 1"],
}


def repository(preset: str, splits: dict[str, str], name: str | None) -> dict[str, bytes]:
    """Parquet files, one for each split, as the Hub converts data sets to them."""
    files = {}
    paths = []
    for theirs in splits.values():
        sink = io.BytesIO()
        rows = [ROWS[preset](n, theirs.split("_")[0]) for n in range(NUM_ROWS)]
        pq.write_table(pa.Table.from_pylist(rows), sink)
        files[f"data/{theirs}-0.parquet"] = sink.getvalue()
        paths.append({"split": theirs, "path": f"data/{theirs}-*"})
    config = {"configs": [{"config_name": name or "default", "data_files": paths}]}
    return {**files, "README.md": f"---\n{json.dumps(config)}\n---\n".encode()}


@pytest.mark.parametrize("preset", ROWS)
def test_a_preset_reads_what_its_data_set_holds(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    with composer(REPOSITORY / "conf") as compose:
        dataset = compose([f"dataset={preset}"])["dataset"]
    given = dataset["split"] if isinstance(dataset["split"], dict) else {"train": dataset["split"]}
    (tmp_path / "side").mkdir()
    side = DataSide(tmp_path / "side", tiny_tokenizer_dir)
    with Hub() as server:
        use(server, tmp_path / "home", monkeypatch)
        files = repository(preset, given, dataset["name"])
        commit = server.commit(f"datasets/{dataset['path']}", files)
        side.run("fetch", overrides=(f"dataset={preset}", f"dataset.revision='{commit}'"))
    facts = side.json("data/raw/source.json")
    contents = [[m["content"] for m in r["messages"]] for part in side.raw().values() for r in part]
    assert EXPECTED[preset] in contents
    assert (
        facts["num_read"]
        == len(contents)
        == (67 * 2 if preset == "oasst" else NUM_ROWS * len(given))
    )
    assert (facts["revision"], facts["licence"], facts["dropped"]) == (
        commit,
        dataset["licence"],
        {},
    )


def test_every_preset_of_the_hub_is_tried() -> None:
    presets = {f.stem: read_yaml(f) for f in (REPOSITORY / "conf/dataset").glob("*.yaml")}
    assert {name for name, values in presets.items() if "/" in values["path"]} == set(ROWS)
