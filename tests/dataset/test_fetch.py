"""Records and tokenizer as they are fetched, and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from dataside import DataSide

from capas.chat.tokenizer import TokenizerFiles
from capas.core.errors import CapasError
from capas.core.records import SPLITS
from capas.hub import embedded
from capas.hub.sources import Source, find_source, snapshot

EMBEDDED = ("tokenizer.json", "tokenizer_config.json")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def side(tmp_path: Path, tiny_tokenizer_dir: Path) -> DataSide:
    return DataSide(tmp_path, tiny_tokenizer_dir)


@pytest.fixture
def shipped(side: DataSide) -> DataSide:
    """data/embedded with the throw-away tokenizer and its manifest."""
    shutil.copytree(side.root / "tokenizer", side.root / embedded.FOLDER)
    folder = side.root / embedded.FOLDER
    files = {n: {"sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest()} for n in EMBEDDED}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    (folder / "model.safetensors").write_text("weights")
    return side


def fetch_shipped(side: DataSide) -> DataSide:
    return side.run("fetch_tokenizer", overrides=(f"model.model_name_or_path={embedded.FOLDER}",))


def test_fetch_writes_three_splits_and_their_source(side: DataSide) -> None:
    source = side.run("fetch").json("data/raw/source.json")
    counts = {split: len(records) for split, records in side.raw().items()}
    assert counts == {"train": 24, "validation": 4, "test": 10}
    assert {split: facts["num_records"] for split, facts in source["splits"].items()} == counts
    assert (source["path"], source["licence"], source["dropped"]) == ("embedded", "apache-2.0", {})
    assert {file.name for file in (side.root / "data/raw").iterdir()} == {
        *(f"{split}.parquet" for split in SPLITS),
        "source.json",
    }


def test_fetch_is_a_function_of_its_seed(side: DataSide) -> None:
    first = side.run("fetch").files()
    assert side.run("fetch").files() == first
    assert side.run("fetch", overrides=("dataset.seed=1",)).files() != first


def test_only_the_files_of_the_tokenizer_are_copied(side: DataSide) -> None:
    (side.root / "tokenizer/model.safetensors").write_text("weights")
    (side.root / "tokenizer/chat_template.jinja").write_text("{{ 1 }}")
    side.run("fetch_tokenizer")
    found = {file.name for file in (side.root / "data/models/tokenizer").iterdir()}
    assert found == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_the_shipped_tokenizer_is_verified_and_copied(shipped: DataSide) -> None:
    fetch_shipped(shipped)
    found = {file.name for file in (shipped.root / "data/models/tokenizer").iterdir()}
    assert found == set(EMBEDDED)


def test_a_changed_shipped_file_is_refused_with_both_hashes(shipped: DataSide) -> None:
    file = shipped.root / embedded.FOLDER / "tokenizer.json"
    expected = shipped.json(embedded.MANIFEST)["files"]["tokenizer.json"]["sha256"]
    file.write_text(file.read_text() + " ")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(CapasError, match=r"git checkout data/embedded.*--replace") as refusal:
        fetch_shipped(shipped)
    assert all(text in str(refusal.value) for text in ("tokenizer.json", found, expected))


def test_a_pointer_of_git_lfs_is_named(shipped: DataSide) -> None:
    (shipped.root / embedded.FOLDER / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )
    with pytest.raises(CapasError, match="Git LFS pointer"):
        fetch_shipped(shipped)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "manifest.json is damaged"),
        ('{"files": []}', "'files' is not an object"),
        ('{"files": {}}', "names no sha256 of tokenizer.json"),
    ],
)
def test_a_damaged_manifest_is_refused(shipped: DataSide, manifest: str, message: str) -> None:
    (shipped.root / embedded.MANIFEST).write_text(manifest)
    with pytest.raises(CapasError, match=message):
        fetch_shipped(shipped)


def test_missing_shipped_files_are_named(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    with pytest.raises(CapasError, match=r"manifest\.json is missing.*git checkout"):
        embedded.verify(manifest, [])
    manifest.write_text('{"files": {"a.bin": {"sha256": "0"}}}')
    with pytest.raises(CapasError, match=r"a\.bin is missing.*git checkout"):
        embedded.verify(manifest, [tmp_path / "a.bin"])


def test_what_ships_with_the_repository_is_whole() -> None:
    manifest = REPOSITORY / embedded.MANIFEST
    names = list(json.loads(manifest.read_text())["files"])
    assert set(EMBEDDED) < set(names)
    embedded.verify(manifest, [manifest.parent / name for name in names])


def test_a_slow_tokenizer_is_refused_with_the_way_to_convert_it(side: DataSide) -> None:
    (side.root / "tokenizer/tokenizer.json").rename(side.root / "tokenizer/tokenizer.model")
    with pytest.raises(
        CapasError, match=r"no tokenizer\.json \(only tokenizer\.model.*save_pretrained"
    ):
        side.run("fetch_tokenizer")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json is damaged"),
        ("tokenizer.json", "[]", "must hold an object, not list"),
        ("tokenizer.json", '{"added_tokens": [{}]}', "is not a tokenizer: KeyError"),
        (
            "tokenizer_config.json",
            '{"bos_token": "<none>"}',
            "bos_token is '<none>', which is not among",
        ),
    ],
)
def test_a_damaged_tokenizer_is_refused(
    side: DataSide, file: str, content: str, message: str
) -> None:
    (side.root / "tokenizer" / file).write_text(content)
    with pytest.raises(CapasError, match=message):
        side.run("fetch_tokenizer")


def test_a_file_that_is_no_tokenizer_is_refused(side: DataSide) -> None:
    (side.root / "tokenizer/tokenizer_config.json").write_text("{}")
    (side.root / "tokenizer/tokenizer.json").write_text(
        '{"added_tokens": [], "model": {"type": "?"}}'
    )
    with pytest.raises(CapasError, match=r"tokenizer\.json is not a tokenizer: "):
        side.run("fetch_tokenizer")


def test_a_named_token_may_be_an_object(side: DataSide) -> None:
    config = side.root / "tokenizer/tokenizer_config.json"
    config.write_text('{"eos_token": {"content": "<eos>", "lstrip": false}, "bos_token": null}')
    assert TokenizerFiles(config.parent).named == {"eos_token": "<eos>"}


def test_the_name_of_a_model_says_where_it_is(side: DataSide) -> None:
    names = (embedded.FOLDER, "tokenizer", "Qwen/Qwen2.5-0.5B", "gpt2")
    found = [find_source(name, side.root) for name in names]
    assert found == [Source.EMBEDDED, Source.FOLDER, Source.HUB, Source.HUB]
    for name in ("./nowhere", "a/b/c", "/nowhere/x"):
        with pytest.raises(CapasError, match="neither a folder here nor the id of a model"):
            find_source(name, side.root)


@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_a_hub_model_needs_a_pinned_commit(side: DataSide, revision: str | None) -> None:
    overrides = ("model.model_name_or_path=owner/name", f"model.revision={revision or 'null'}")
    with pytest.raises(
        CapasError, match=r"is not a commit of owner/name; a branch can move.*compose"
    ):
        side.run("fetch_tokenizer", overrides=overrides)


def test_a_hub_out_of_reach_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CapasError, match=r"owner/name at \w{40} could not be downloaded(.|\n)*model=embedded"
    ):
        snapshot("owner/name", COMMIT, ["*.json"])


def test_a_hub_snapshot_asks_for_the_files_of_the_tokenizer_only(
    side: DataSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(side.root / "tokenizer")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    side.run(
        "fetch_tokenizer", overrides=("model.model_name_or_path=o/n", f"model.revision='{COMMIT}'")
    )
    patterns = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "config.json",
    ]
    one = {"name": "o/n", "repo_type": "model", "revision": COMMIT}
    assert asked == {**one, "allow_patterns": patterns}
