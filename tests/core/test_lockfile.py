"""dvc.lock that was cut where DVC was killed: no entry is believed that is not whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from capas.core.dag import StageSpec
from capas.core.lockfile import entry, flaw, heal, join, split

OUT = {"path": "data/raw", "hash": "md5", "md5": f"{'a' * 32}.dir", "size": 77451, "nfiles": 3}
TABLE = {"path": "reports/train.csv", "hash": "md5", "md5": "b" * 32, "size": 2048}
STAGES = {
    "fetch": {
        "cmd": "python fetch.py",
        "deps": [{"path": "fetch.py", "hash": "md5", "md5": "c" * 32, "size": 10}],
        "params": {"params.yaml": {"dataset.seed": 0, "dataset.reading": {"encoding": None}}},
        "outs": [OUT],
    },
    "train": {
        "cmd": "python train.py",
        "deps": [dict(OUT)],
        "params": {"params.yaml": {"lora.r": 16, "trainer.learning_rate": 0.004}},
        "outs": [{**TABLE, "path": "adapter"}, dict(TABLE)],
    },
}
TEXT = yaml.safe_dump({"schema": "2.0", "stages": STAGES}, sort_keys=False)
SPECS = {
    "fetch": StageSpec("fetch", "python fetch.py", ("fetch.py",), ("data/raw",), {}),
    "train": StageSpec(
        "train", "python train.py", ("data/raw",), ("adapter", "reports/train.csv"), {}
    ),
}


def test_a_whole_lock_stays_as_it_is() -> None:
    assert heal(TEXT, TEXT, SPECS) == (TEXT, [])
    assert heal(TEXT, "", {}) == (TEXT, [])
    assert join(split(TEXT)) == TEXT


@pytest.mark.parametrize("committed", ["", TEXT])
def test_wherever_it_is_cut_no_entry_is_believed_that_is_not_whole(committed: str) -> None:
    """At the end of an entry a cut is seen by what the last commit has; DVC runs a stage without an entry."""
    boundaries = [TEXT.index("  train:\n")]
    for length in range(len(TEXT)):
        healed, said = heal(TEXT[:length], committed, SPECS)
        found = {name: entry(piece) for name, piece in split(healed).items()}
        assert all(found[name] == STAGES[name] for name in found), length
        assert said or (length in boundaries and not committed), length
        if committed:
            assert healed == TEXT


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("md5: " + "b" * 32, "md5: " + "b" * 20, "adapter has no md5 or size"),
        ("  md5: " + "b" * 32, "  hash: md5", "adapter has no md5 or size"),
        ("      nfiles: 3\n", "", "data/raw has no md5 or size"),
        ("    cmd: python train.py\n", "", "no command"),
        ("    - path: reports/train.csv\n", "    - other: x\n", "an entry has no md5 or size"),
    ],
)
def test_an_entry_without_what_dvc_compares_is_not_whole(old: str, new: str, reason: str) -> None:
    piece = split(TEXT)["train"]
    assert flaw(piece.replace(old, new, 1), SPECS["train"]) == reason


def test_an_output_that_dvc_yaml_declares_is_missed() -> None:
    """Of another command it is not: dvc.yaml was edited, and DVC sees that."""
    piece = split(TEXT)["train"]
    short = piece[: piece.index("    - path: reports/train.csv")]
    assert flaw(short, SPECS["train"]) == "reports/train.csv missing"
    assert flaw(short.replace("train.py", "other.py"), SPECS["train"]) == ""
    assert flaw(short, SPECS["train"], is_last=False) == "", "of a version without that output"


def test_entries_of_this_run_stay_and_the_others_come_from_the_commit() -> None:
    older = TEXT.replace("c" * 32, "d" * 32)
    cut = TEXT[: TEXT.index("  train:\n") + 60]
    healed, said = heal(cut, older, SPECS)
    assert said == ["dvc.lock: the entry of train is incomplete: truncated"]
    assert split(healed) == {"fetch": split(TEXT)["fetch"], "train": split(older)["train"]}


def test_a_lock_of_a_version_with_fewer_outputs_is_left_to_dvc() -> None:
    specs = {**SPECS, "fetch": replace(SPECS["fetch"], outs=("data/raw", "reports/new.json"))}
    assert heal(TEXT, TEXT, specs) == (TEXT, [])


def test_a_stage_that_dvc_yaml_no_longer_has_is_not_brought_back() -> None:
    cut = TEXT[: TEXT.index("  train:\n")]
    assert heal(cut, TEXT, {"fetch": SPECS["fetch"]}) == (cut, [])


def test_another_layout_is_left_alone(tmp_path: Path) -> None:
    other = yaml.safe_dump({"stages": STAGES, "schema": "2.0"}, sort_keys=False)
    assert heal(other, "", SPECS) == (other, [])
