"""conf/revisions.yaml: a name that moves is asked for once."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hub import Hub, go_offline, use

from capas.config.pins import Pins, is_hub_dataset
from capas.core.dag import read_yaml
from capas.core.errors import CapasError
from capas.dataset.files import url_revision
from capas.hub.sources import folder_revision

COMMIT = "0123456789" * 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        use(server, tmp_path / "home", monkeypatch)
        yield server


def values(
    name: Any = "org/x", revision: Any = None, path: Any = "embedded", **dataset: Any
) -> dict[str, Any]:
    return {
        "model": {"model_name_or_path": name, "revision": revision},
        "dataset": {"path": path, "revision": None, **dataset},
        "seed": 0,
    }


def test_a_branch_is_asked_for_once_and_stays(hub: Hub, tmp_path: Path) -> None:
    first = hub.commit("models/org/x", {"config.json": b"{}"})
    pins = Pins({}, tmp_path)
    given = values()
    assert pins.resolve(given)["model"]["revision"] == first
    assert given == values(), "the values given are left as they are"
    hub.commit("models/org/x", {"config.json": b"{ }"})
    hub.asked.clear()
    assert pins.resolve(values())["model"]["revision"] == first
    assert pins.resolve(values(revision="main"))["model"]["revision"] == first
    assert pins.known(values())["model"]["revision"] == first
    assert hub.asked == []


def test_what_was_written_is_what_is_read(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit("models/org/x", {"config.json": b"{}"}, branch="refs/pr/1")
    pins, file = Pins({}, tmp_path), tmp_path / "revisions.yaml"
    pins.resolve(values(revision="refs/pr/1"))
    assert pins.changed
    file.write_text(pins.dump())
    assert read_yaml(file) == {"models": {"org/x@refs/pr/1": commit}}
    again = Pins.read(file, tmp_path)
    assert (again.entries, again.changed) == (pins.entries, False)


def test_a_commit_that_is_all_digits_stays_a_text(tmp_path: Path) -> None:
    entries = {"models": {"org/x@main": "1" * 10 + "e" + "1" * 29}}
    (tmp_path / "revisions.yaml").write_text(Pins(entries, tmp_path).dump())
    assert Pins.read(tmp_path / "revisions.yaml", tmp_path).entries == entries


def test_an_update_shows_old_and_new(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = hub.commit("models/org/x", {"config.json": b"{}"})
    pins = Pins({}, tmp_path)
    pins.resolve(values())
    pins.update(values())
    assert f"org/x@main: {first}, unchanged" in caplog.text
    second = hub.commit("models/org/x", {"config.json": b"{ }"})
    pins.update(values())
    assert f"org/x@main: {first} -> {second}" in caplog.text
    assert pins.resolve(values())["model"]["revision"] == second


def test_a_commit_is_taken_as_it_is(hub: Hub, tmp_path: Path) -> None:
    pins = Pins({}, tmp_path)
    given = values(revision=COMMIT, path="org/data") | {"dataset": {"path": "x", "revision": None}}
    assert pins.resolve(given) == given
    pins.update(given)
    assert (hub.asked, pins.changed) == ([], False)


def test_the_embedded_default_is_not_touched(hub: Hub, tmp_path: Path) -> None:
    given = values(name="data/embedded")
    assert Pins({}, tmp_path).resolve(given) == given
    assert hub.asked == []


def test_without_a_network_the_pin_counts_and_its_absence_is_said(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    pins = Pins({"models": {"org/x@main": COMMIT}}, tmp_path)
    assert pins.resolve(values())["model"]["revision"] == COMMIT
    with pytest.raises(
        CapasError, match=r"(?s)offline.*\nmodel.revision=v2 is not pinned yet. Set"
    ):
        pins.resolve(values(revision="v2"))
    assert pins.known(values(revision="v2")) == values(revision="v2")


def test_a_data_set_and_each_source_of_a_mixture_are_pinned(hub: Hub, tmp_path: Path) -> None:
    a, b = (hub.commit(f"datasets/org/{name}", {"train.csv": b"a\n1\n"}) for name in "ab")
    mix = [{"path": "org/b", "weight": 1.0}, {"path": "json"}]
    pins = Pins({}, tmp_path)
    found = pins.resolve(values(name="data/embedded", path="org/a", mix=mix))["dataset"]
    assert (found["revision"], found["mix"][0]["revision"]) == (a, b)
    assert found["mix"][1] == {"path": "json"}
    assert pins.entries == {"datasets": {"org/a@main": a, "org/b@main": b}}


def test_the_key_of_a_source_of_a_mixture_is_named(hub: Hub, tmp_path: Path) -> None:
    given = values(name="data/embedded", mix=[{"path": "org/none", "revision": "main"}])
    with pytest.raises(CapasError, match=r"^dataset.mix\[0\].path=org/none at main") as refusal:
        Pins({}, tmp_path).resolve(given)
    assert "dataset.mix[0].revision=main is not pinned yet" in str(refusal.value)


def test_a_folder_is_pinned_to_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    pins, first = Pins({}, tmp_path), folder_revision(tmp_path / "mine")
    assert pins.resolve(values(name="mine"))["model"]["revision"] == first
    (tmp_path / "mine/config.json").write_text("{ }")
    assert pins.resolve(values(name="mine"))["model"]["revision"] == first
    pins.update(values(name="mine"))
    assert pins.entries == {"models": {"mine": folder_revision(tmp_path / "mine")}} != first


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("org/data", True),
        ("openai/gsm8k", True),
        ("data/mine.jsonl", False),  # a file that is missing here
        ("data/mine.csv.gz", False),
        ("there/folder", False),
        ("json", False),
        ("s3://bucket/x", False),
        ("../data", False),
        ("data/*.json", False),
    ],
)
def test_owner_and_name_is_a_data_set_on_the_hub(tmp_path: Path, path: str, is_one: bool) -> None:
    (tmp_path / "there/folder").mkdir(parents=True)
    assert is_hub_dataset(path, tmp_path) is is_one


@pytest.mark.parametrize("wrong", [3, None, ["org/x"]])
def test_values_of_a_wrong_type_are_left_to_the_schema(tmp_path: Path, wrong: Any) -> None:
    for given in (values(name=wrong), values(revision=3), values("./none", path=wrong, mix=wrong)):
        assert Pins({}, tmp_path).known(given) == given
    for given in ({}, {"model": wrong}, {"model": {"model_name_or_path": "."}, "dataset": wrong}):
        assert Pins({}, tmp_path).known(given) == given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  a: b\n", "revisions.yaml: model: expected models, adapters or datasets"),
        ("models: [a]\n", "models: expected models, adapters or datasets"),
        ("models:\n  org/x@main: main\n", "models: org/x@main: 'main' is neither a commit"),
    ],
)
def test_a_damaged_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "revisions.yaml").write_text(text)
    with pytest.raises(CapasError, match=message):
        Pins.read(tmp_path / "revisions.yaml", tmp_path)


def test_files_behind_urls_are_pinned_to_what_they_hold(tmp_path: Path) -> None:
    url = "memory://pins/a.jsonl"
    with fsspec.open(url, "wb") as file:
        file.write(b'{"prompt": "a", "completion": "b"}')
    pins = Pins({}, tmp_path)
    given = values("data/embedded", path="json", data_files={"train": [url]})
    pin = pins.resolve(given)["dataset"]["revision"]
    assert pin == url_revision(url)
    with fsspec.open(url, "wb") as file:
        file.write(b"{}")
    assert pins.resolve(given)["dataset"]["revision"] == pin
    pins.update(given)
    assert pins.resolve(given)["dataset"]["revision"] == url_revision(url) != pin
    (tmp_path / "revisions.yaml").write_text(pins.dump())
    assert Pins.read(tmp_path / "revisions.yaml", tmp_path).entries == {
        "datasets": {url: url_revision(url)}
    }


def test_local_files_need_no_pin(tmp_path: Path) -> None:
    given = values("data/embedded", path="json", data_files="data/own/a.jsonl")
    assert Pins({}, tmp_path).resolve(given)["dataset"]["revision"] is None
