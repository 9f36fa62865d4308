"""fetch on sources of the user's own: splits, ids, duplicates, leaks, mixtures, subsets, pins."""

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataside import DataSide

from capas.core.errors import CapasError
from capas.core.records import SPLITS
from capas.dataset.files import url_revision
from capas.dataset.pool import Part, _chunks
from capas.dataset.rows import Row

MINE = (
    *("dataset=own_jsonl", "dataset.test_fraction=0.2", "dataset.validation_fraction=0.1"),
    "dataset.split_by=prompt",
)


@pytest.fixture
def side(tmp_path: Path, tiny_tokenizer_dir: Path) -> DataSide:
    return DataSide(tmp_path, tiny_tokenizer_dir)


def asked(number: int | str, **more: Any) -> dict[str, Any]:
    return {"question": f"Question {number}?", "answer": f"Answer {number}.", **more}


def fetch(side: DataSide, *overrides: str, files: str | None = None) -> dict[str, Any]:
    """Runs fetch on data/own/mine.jsonl; source.json."""
    given = (f"dataset.data_files={files}",) if files else ()
    side.run("fetch", overrides=(*MINE, *given, *overrides))
    facts: dict[str, Any] = side.json("data/raw/source.json")
    return facts


def where(side: DataSide) -> dict[str, str]:
    """{id: split}."""
    return {record["id"]: split for split, records in side.raw().items() for record in records}


def test_splits_are_made_and_another_record_moves_no_other(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n) for n in range(300)))
    facts = fetch(side)
    before = where(side)
    assert {s: f["num_records"] for s, f in facts["splits"].items()} == {
        split: list(before.values()).count(split) for split in SPLITS
    }
    assert len(before) == 300
    assert 30 < list(before.values()).count("test") < 90
    side.own("mine.jsonl", asked("new"), *(asked(n) for n in range(300)))
    fetch(side)
    after = where(side)
    assert {k: v for k, v in after.items() if k in before} == before
    assert len(after) == 301


def test_a_second_run_gives_the_same_bytes(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n) for n in range(100)))
    fetch(side)
    first = side.files()
    fetch(side)
    assert side.files() == first


def test_source_json_says_what_was_read(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n, topic="x") for n in range(60)), asked(1), asked("1!"))
    facts = fetch(side)
    [source] = facts["sources"]
    assert source["files"][0]["file"] == "data/own/mine.jsonl"
    assert source["files"][0]["bytes"] == (side.root / "data/own/mine.jsonl").stat().st_size
    assert (facts["num_read"], source["num_records"]) == (62, 61)
    assert facts["left_out"] == {"topic": 60}
    [duplicate] = facts["dropped"]["duplicate"]["examples"]
    assert facts["dropped"]["duplicate"]["count"] == 1
    assert (duplicate["file"], duplicate["at"]) == ("data/own/mine.jsonl", "line 61")
    assert duplicate["value"] == "'Question 1?'"
    assert duplicate["why"] == "like data/own/mine.jsonl, line 2"


def test_an_own_id_is_kept_for_the_first_with_it(side: DataSide) -> None:
    rows = [asked(n, id=n) for n in range(80)]
    side.own("mine.jsonl", *rows, asked("a", id=3), asked("b", id="x"), asked("c", id=None))
    fetch(side)
    found = {r["messages"][0]["content"]: r["id"] for part in side.raw().values() for r in part}
    assert [found[f"Question {n}?"] for n in (3, "b")] == ["3", "x"]
    assert all(len(found[f"Question {n}?"]) == 16 for n in ("a", "c"))


def test_copies_that_are_kept_have_ids_of_their_own(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n % 40) for n in range(120)))
    facts = fetch(side, "dataset.duplicates=keep")
    assert len(where(side)) == 120
    assert facts["kept"] == {"duplicate": 80}


def test_the_number_of_processes_changes_no_byte(
    side: DataSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f'"Pregunta {n}","{"" if n % 11 == 0 else f"Respuesta {n}"}"' for n in range(60)]
    wrong = ["too,many,cells", '"Pregunta 1","Respuesta 1"']
    for name, part in (("a.csv", rows[:25] + wrong), ("b.csv", rows[25:])):
        text = "\n".join(["pregunta,respuesta", *part]) + "\n"
        (side.root / "data/own" / name).write_text(text, encoding="utf-8")
    csv = ("dataset.path=csv", "dataset.shape=columns", "dataset.system=Hola")
    mapped = "dataset.columns={user:pregunta,assistant:respuesta}"
    drop = [f"dataset.flaws.{kind}=drop" for kind in ("malformed", "empty_answer")]
    monkeypatch.setattr("capas.dataset.pool.ROWS_PER_CHUNK", 1)
    made = []
    for cores in (1, 2):
        monkeypatch.setattr("capas.core.workers.usable_cores", lambda cores=cores: cores)
        budget = "dataset.flaw_budget_fraction=0.2"
        facts = fetch(side, *csv, mapped, *drop, budget, files="data/own/*.csv")
        made.append(side.files())
    assert made[0] == made[1]
    assert facts["dropped"]["empty_answer"]["count"] == 6
    assert [e["at"] for e in facts["dropped"]["bad_row"]["examples"]] == ["line 27"]
    monkeypatch.setattr("capas.core.workers.usable_cores", lambda: 2)
    with pytest.raises(CapasError, match=r"a\.csv, line 2: respuesta is '': an empty answer"):
        fetch(side, *csv, mapped, files="data/own/*.csv")


@pytest.mark.parametrize("cores", [1, 2])
def test_a_record_nested_without_end_is_refused(
    cores: int, side: DataSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    side.own("mine.jsonl", *(asked(n) for n in range(50)), asked("deep", metadata={"deep": deep}))
    monkeypatch.setattr("capas.dataset.pool.ROWS_PER_CHUNK", 1)
    monkeypatch.setattr("capas.core.workers.usable_cores", lambda: cores)
    message = r"line 51: record is .*: JSON nested deeper than 100 levels is not a conversation"
    with pytest.raises(CapasError, match=message):
        fetch(side)


def test_long_records_travel_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capas.dataset.pool.CHARACTERS_PER_CHUNK", 100)
    part = Part(0, 0, "auto", {}, None)
    rows = [Row("mine.jsonl", "line", n, {"text": ["x" * length]}) for n, length in enumerate(
        [10] * 12 + [500, 500, 1])]  # fmt: skip
    found = [len(chunk.rows) for chunk in _chunks([(part, rows)])]
    assert found == [11, 2, 1, 1]


def test_duplicates_may_be_an_error_with_both_places(side: DataSide) -> None:
    side.own("mine.jsonl", asked(1), asked(2), asked(1))
    with pytest.raises(CapasError, match=r"line 3 is like data/own/mine.jsonl, line 1.*duplicates"):
        fetch(side, "dataset.duplicates=error")


def given_splits(side: DataSide) -> str:
    train = side.own("a.jsonl", *(asked(n) for n in range(50)), asked("10!"))
    validation = side.own("v.jsonl", *(asked(n) for n in range(100, 110)))
    test = side.own("t.jsonl", *(asked(n) for n in range(200, 209)), asked("question 10", x=1))
    side.own("t.jsonl", *(asked(n) for n in range(200, 209)), {**asked(10), "answer": "Other"})
    return f"{{train:{train},validation:{validation},test:{test}}}"


def test_leaks_between_given_splits_are_dropped_from_train(side: DataSide) -> None:
    files = given_splits(side)
    facts = fetch(side, "dataset.leak_budget_fraction=0.05", files=files)
    assert facts["dropped"]["leak"]["count"] == 2
    places = [(e["at"], e["value"]) for e in facts["dropped"]["leak"]["examples"]]
    assert places == [("line 11", "'Question 10?'"), ("line 51", "'Question 10!?'")]
    whys = {example["why"] for example in facts["dropped"]["leak"]["examples"]}
    assert whys == {"like data/own/t.jsonl, line 10"}
    counts = {split: len(records) for split, records in side.raw().items()}
    assert counts == {"train": 49, "validation": 10, "test": 10}


def test_leaks_are_kept_or_refused_as_stated(side: DataSide) -> None:
    files = given_splits(side)
    with pytest.raises(CapasError, match=r"2 of 61 records.*a\.jsonl, line 11.*at least 0\.0327"):
        fetch(side, "dataset.leak_budget_fraction=0.01", files=files)
    with pytest.raises(CapasError, match=r"line 11 is like data/own/\w\.jsonl.*dataset\.leaks"):
        fetch(side, "dataset.leaks=error", files=files)
    assert fetch(side, "dataset.leaks=keep", files=files)["kept"] == {"leak": 2}


def test_a_split_that_is_not_given_is_made_of_train(side: DataSide) -> None:
    given_splits(side)
    facts = fetch(side, files="{train:data/own/a.jsonl,test:data/own/t.jsonl}")
    counts = {split: facts["splits"][split]["num_records"] for split in SPLITS}
    assert counts["test"] == 10
    assert 0 < counts["validation"] < 15


def test_a_subset_is_a_seeded_choice_of_all_splits(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n) for n in range(400)))
    fetch(side)
    everything = where(side)
    facts = fetch(side, "dataset.max_records=100")
    chosen = where(side)
    assert facts["dropped"]["beyond_max_records"]["count"] == 300
    assert len(chosen) == 100
    assert chosen.items() <= everything.items()
    assert fetch(side, "dataset.max_records=100", "dataset.seed=1")
    assert where(side).keys() != chosen.keys()


def other_source(files: str, weight: str) -> str:
    empty = "name:null,revision:null,split:null,columns:null,roles:null,system:Hola,shape:auto"
    return f"dataset.mix=[{{path:json,data_files:{files},weight:{weight},{empty},licence:mit}}]"


def test_sources_are_mixed_by_weight(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n) for n in range(400)))
    other = side.own("other.jsonl", *(asked(f"o{n}") for n in range(400)))
    facts = fetch(side, "dataset.weight=3", other_source(other, "1"))
    train = side.raw()["train"]
    hola = [r for r in train if r["messages"][0] == {**r["messages"][0], "role": "system"}]
    assert 0.15 < len(hola) / len(train) < 0.35
    assert facts["dropped"]["not_drawn"]["count"] > 100
    assert [source["licence"] for source in facts["sources"]] == ["unknown", "mit"]


def test_without_weights_all_records_are_taken_one_source_after_the_other(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n) for n in range(100)))
    other = side.own("other.jsonl", *(asked(f"o{n}") for n in range(50)))
    facts = fetch(side, other_source(other, "null"))
    assert [source["num_records"] for source in facts["sources"]] == [100, 50]
    systems = [len(record["messages"]) == 3 for record in side.raw()["train"]]
    assert systems == sorted(systems)


def test_a_system_prompt_is_put_first_where_there_is_none(side: DataSide) -> None:
    own = {"role": "system", "content": "Own"}
    told = [own, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    side.own("mine.jsonl", *(asked(n) for n in range(99)), {"messages": told}, {"text": "plain"})
    fetch(side, "dataset.system=Kind")
    first = [record["messages"][0] for part in side.raw().values() for record in part]
    assert [m["content"] for m in first].count("Kind") == 99
    assert {m["role"] for m in first} == {"system", "text"}


def test_a_url_needs_the_pin_of_its_content(side: DataSide) -> None:
    url = "memory://fetch/mine.jsonl.gz"
    rows = "".join(json.dumps(asked(n)) + "\n" for n in range(99))
    with fsspec.open(url, "wb") as file:
        file.write(gzip.compress(rows.encode()))
    pin = url_revision(url)
    for revision in ("null", "'0123456789abcdef'"):
        with pytest.raises(CapasError, match=rf"dataset\.revision=.*set revision: {pin}"):
            fetch(side, f"dataset.revision={revision}", files=url)
    assert fetch(side, f"dataset.revision='{pin}'", files=url)["revision"] == pin


def test_rows_of_the_hub_go_the_same_way(side: DataSide, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def read_split(
        path: str, name: str | None, revision: str, split: str, key: str, **_: Any
    ) -> Any:
        called.append((path, name, revision, split, key))
        return iter([asked(f"{split} {n}", score=None) for n in range(60)])

    hub: Any = types.ModuleType("capas.dataset.hub")
    hub.read_split = read_split
    monkeypatch.setitem(sys.modules, "capas.dataset.hub", hub)
    side.run("fetch", overrides=("dataset=gsm8k", "dataset.test_fraction=0.05"))
    found = side.json("data/raw/source.json")
    assert called == [("openai/gsm8k", "main", "main", s, "dataset") for s in ("train", "test")]
    assert found["splits"]["test"]["num_records"] == 60
    assert found["left_out"] == {}


def test_all_kinds_of_flaws_are_told_at_once(side: DataSide) -> None:
    wrong = [asked(1, answer=""), {"question": "Q", "answer": 7}, asked(2, answer=" "), {"q": 1}]
    side.own("mine.jsonl", *(asked(n) for n in range(99)), *wrong)
    with pytest.raises(CapasError) as refusal:
        fetch(side, "dataset.flaws.not_text=drop")
    text = str(refusal.value)
    assert text.startswith("3 of 103 records cannot be used:\n")
    assert "missing_column 1: data/own/mine.jsonl, line 103: columns is ['q']" in text
    assert "empty_answer 2: data/own/mine.jsonl, line 100: answer is '': an empty answer" in text
    assert "Likewise data/own/mine.jsonl, line 102\n" in text
    assert "Or set dataset.flaws.empty_answer to drop" in text
    assert "not_text" not in text


def test_fetch_tells_what_it_left_out_and_repaired(
    side: DataSide, caplog: pytest.LogCaptureFixture
) -> None:
    merged = [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]
    side.own("mine.jsonl", *(asked(n, topic="x") for n in range(99)), {"messages": merged})
    with caplog.at_level("INFO", "capas"):
        fetch(side, "dataset.flaws.consecutive_roles=merge")
    assert "unused columns and keys, with their counts: topic 99" in caplog.text
    assert "repaired: consecutive_roles 1 (merge)" in caplog.text


QESTION = "dataset.columns={user:qestion,assistant:answer}"


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_column_that_no_record_has_is_an_error_before_any_record(
    side: DataSide, kind: str
) -> None:
    rows = [asked(n, topic="x") for n in range(99)]
    name = side.own("mine.jsonl", *rows)
    if kind == "csv":
        lines = [",".join(row.values()) for row in ({k: k for k in rows[0]}, *rows)]
        name = name.replace("jsonl", "csv")
        (side.root / name).write_text("\n".join(lines))
    if kind == "parquet":
        name = name.replace("jsonl", "parquet")
        pq.write_table(pa.Table.from_pylist(rows), side.root / name)
    message = (
        rf"^{name}: column 'qestion', needed by dataset.columns, does not exist; the columns are "
        r"'question', 'answer', 'topic'; did you mean 'question'\?$"
    )
    with pytest.raises(CapasError, match=message):
        fetch(side, f"dataset.path={kind}", "dataset.shape=columns", QESTION, files=name)
    with pytest.raises(
        CapasError, match=r"column 'prompt', needed by dataset.shape=prompt_completion"
    ):
        fetch(side, f"dataset.path={kind}", "dataset.shape=prompt_completion", files=name)
    facts = fetch(side, f"dataset.path={kind}", files=name)
    assert (facts["num_read"], facts["left_out"]) == (99, {"topic": 99})


def test_no_known_shape_is_told_once(side: DataSide) -> None:
    side.own("mine.jsonl", *({"pregunta": str(n), "respuesta": "x"} for n in range(300)))
    with pytest.raises(
        CapasError, match=r"^data/own/mine.jsonl: columns are pregunta, respuesta: no"
    ):
        fetch(side)


def test_a_record_without_a_column_that_others_have_is_a_flaw(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n) for n in range(99)), {"question": "Q"})
    with pytest.raises(CapasError, match=r"line 100: answer is \['question'\]: missing; the shape"):
        fetch(side, "dataset.shape=question_answer")


def test_texts_that_are_cut_are_told(side: DataSide, caplog: pytest.LogCaptureFixture) -> None:
    text = "\n\n".join(f"Paragraph number {n}." for n in range(200))
    (side.root / "data/own/book.txt").write_text(text)
    with caplog.at_level("INFO", "capas"):
        stated = ("dataset.path=text", "dataset.reading.max_characters=50")
        facts = fetch(side, *stated, files="data/own/book.txt")
    assert facts["num_read"] == 100
    assert "1 texts longer than dataset.reading.max_characters=50 split into 100" in caplog.text


def test_flaws_stop_fetch_or_stay_within_their_budget(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n) for n in range(99)), {"question": "Q", "answer": ""})
    with pytest.raises(CapasError, match=r"mine\.jsonl, line 100: answer is ''"):
        fetch(side)
    drop = "dataset.flaws.empty_answer=drop"
    with pytest.raises(CapasError, match=r"1 of 100 records were dropped \(empty_answer 1\)"):
        fetch(side, drop)
    facts = fetch(side, drop, "dataset.flaw_budget_fraction=0.01")
    assert facts["dropped"]["empty_answer"]["examples"][0]["at"] == "line 100"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("dataset.test_fraction=0.0",), "no record is left for test.*dataset.test_fraction"),
        (("dataset.max_records=3",), "no record is left for .*dataset.max_records"),
    ],
)
def test_an_empty_split_is_refused(side: DataSide, overrides: Any, message: str) -> None:
    side.own("mine.jsonl", *(asked(n) for n in range(100)))
    with pytest.raises(CapasError, match=message):
        fetch(side, *overrides)


WORDS = [f"{a}{b}{c}{d}" for a in "bdfgk" for b in "aeiou" for c in "lmnrt" for d in "aeiou"]
CLUSTER = ("dataset.split_by=cluster", "dataset.test_fraction=null")


def twins(count: int) -> list[dict[str, Any]]:
    """Three phrasings of each question, next to each other in no order of the file."""
    forms = ("How do I {0} a {1}?", "how do i {0} a {1}", "How do I {0} a {1}, please?")
    pairs = [(WORDS[i], WORDS[-i]) for i in range(1, count + 1)]
    asked = [form.format(*pair) for form in forms for pair in pairs]
    return [{"question": text, "answer": f"Answer {i}."} for i, text in enumerate(asked)]


def test_near_duplicates_stay_on_one_side_and_are_counted(
    side: DataSide, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "capas")
    side.own("mine.jsonl", *twins(100))
    facts = fetch(side, *CLUSTER)
    assert {s: f["num_records"] for s, f in facts["splits"].items()} == {
        **{"train": 210, "validation": 30, "test": 60}
    }
    found = facts["near_duplicates"]
    assert (found["num_records"], found["num_groups"], found["largest_group"]) == (300, 100, 3)
    assert found["num_test_records_like_train"] == 0
    assert "300 records are near-duplicates (100 groups" in caplog.text
    assert "60 test records: a difference below about 18 points cannot be shown" in caplog.text
    split_of: dict[str, set[str]] = {}
    for split, records in side.raw().items():
        for record in records:
            words = record["messages"][0]["content"].lower().split()
            split_of.setdefault(words[3], set()).add(split)
    assert len(split_of) == 100 and all(len(splits) == 1 for splits in split_of.values())


def test_a_subset_of_clusters_keeps_the_shares_of_the_splits(side: DataSide) -> None:
    side.own("mine.jsonl", *twins(100))
    counts = {
        s: f["num_records"]
        for s, f in fetch(side, *CLUSTER, "dataset.max_records=100")["splits"].items()
    }
    assert sum(counts.values()) == 100
    assert 10 <= counts["test"] <= 30 and 50 <= counts["train"] <= 85 and counts["validation"] >= 3


def test_near_duplicates_in_two_splits_are_told_with_their_places(
    side: DataSide, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "capas")
    side.own("mine.jsonl", *twins(60))
    found = fetch(side, "dataset.leak_budget_fraction=0.9")["near_duplicates"]
    assert found["num_test_records_like_train"] > 10
    example = found["examples"][0]
    assert example["file"] == "data/own/mine.jsonl" and example["why"].startswith(
        "near-duplicate of data/own/"
    )
    assert "dataset.split_by=cluster keeps near-duplicates in one split" in caplog.text
    without = fetch(
        side, "dataset.leak_budget_fraction=0.9", "dataset.near_duplicate_similarity=null"
    )
    assert without["near_duplicates"] is None


def test_a_file_of_one_question_cannot_be_split_by_clusters(side: DataSide) -> None:
    side.own("mine.jsonl", *(asked(n) for n in range(20)))
    with pytest.raises(CapasError, match=r"20 of 20 records are near-duplicates.*split_by: prompt"):
        fetch(side, *CLUSTER)


def test_a_source_without_records_is_refused(side: DataSide) -> None:
    side.own("mine.jsonl")
    with pytest.raises(CapasError, match="contain no records"):
        fetch(side)


LARGE = "instructions_52k.jsonl.gz"
KIT_FILES: dict[str, tuple[int, tuple[str, ...]]] = {
    "gsm8k_train_2k.jsonl": (2000, ()),
    "gsm8k_test.jsonl": (1319, ()),
    "multiturn_3k.jsonl": (3000, ()),
    "oasst_threads.jsonl": (400, ()),
    "xquad_es.jsonl": (1190, ()),
    "prompts.csv": (
        1525,
        ("dataset.path=csv", "dataset.shape=columns", "dataset.columns={text:prompt,id:act}"),
    ),
    LARGE: (
        52002,
        ("dataset.flaws.empty_answer=drop", "dataset.flaw_budget_fraction=0.001"),
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == LARGE else ()) for n in KIT_FILES]
)
def test_every_file_of_the_kit_is_fetched(side: DataSide, kit: Path, name: str) -> None:
    (side.root / "data/own" / name).symlink_to(kit / "data" / name)
    num_rows, overrides = KIT_FILES[name]
    facts = fetch(side, *overrides, files=f"data/own/{name}")
    num_dropped = sum(reason["count"] for reason in facts["dropped"].values())
    num_kept = sum(split["num_records"] for split in facts["splits"].values())
    assert facts["num_read"] == num_rows == num_kept + num_dropped
    assert len(where(side)) == num_kept
    assert facts["dropped"].get("empty_answer", {"count": 0})["count"] == (
        12 if name == LARGE else 0
    )


def test_a_sample_of_the_large_file_is_fetched(side: DataSide, kit: Path) -> None:
    """One record in 25, and all that have no answer."""
    with gzip.open(kit / "data" / LARGE, "rt", encoding="utf-8") as lines:
        sample = [line for i, line in enumerate(lines) if i % 25 == 0 or '"output": ""' in line]
    (side.root / "data/own" / LARGE).write_bytes(gzip.compress("".join(sample).encode()))
    budget = "dataset.flaw_budget_fraction=0.01"
    drop = "dataset.flaws.empty_answer=drop"
    facts = fetch(side, drop, budget, files=f"data/own/{LARGE}")
    dropped = {reason: found["count"] for reason, found in facts["dropped"].items()}
    assert facts["num_read"] == len(sample) > 2000
    assert dropped["empty_answer"] == 12
    assert len(where(side)) == len(sample) - sum(dropped.values())


def test_the_kit_holds_no_other_file(kit: Path) -> None:
    assert {file.name for file in (kit / "data").iterdir()} == set(KIT_FILES)
