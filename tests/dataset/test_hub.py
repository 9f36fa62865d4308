"""Models, tokenizers and data sets from the Hub, through the real clients, against a hub on loopback."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Fault, Hub, go_offline, use
from published import publish
from report_inputs import write_inputs
from shipped import composed
from tiny import REPOSITORY, run_stage
from workspace import make_workspace

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.dataset.hub import read_split
from capas.dataset.source import sources_of
from capas.hub import repository as client
from stages import fetch_model, fetch_tokenizer

SECRET = "hf_" + "Secret" * 5  # not as it stands here: the tests look for it in all files
MODEL, DATASET = "org/tiny", "org/questions"
ROWS = [{"question": f"q{i}", "answer": f"a{i}", "facts": {"number": i}} for i in range(10)]
README = b"""---
configs:
- config_name: main
  data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]
- config_name: hard
  data_files: [{split: train, path: hard/*}]
---
"""


SEMICOLON = b"""---
configs:
- config_name: default
  sep: ";"
  data_files: [{split: train, path: "*.csv"}]
---
"""
LABEL = b"""---
dataset_info:
  features:
  - name: kind
    dtype: {class_label: {names: {"0": call, "1": talk}}}
---
"""


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


QUESTIONS = {
    "README.md": README,
    "main/train-0.parquet": parquet(ROWS[:6]),
    "main/train-1.parquet": parquet(ROWS[6:]),
    "main/test-0.parquet": parquet(ROWS[:2]),
    "hard/0.parquet": parquet(ROWS[:1]),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(client, "WAITS_SECONDS", (0.01, 0.01, 0.01))
    with Hub(tokens=(SECRET,)) as server:
        use(server, tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture
def files(tiny_model_dir: Path, tiny_tokenizer_dir: Path) -> dict[str, bytes]:
    """A model's repository, with what nobody asked for beside it."""
    found = {
        file.name: file.read_bytes()
        for folder in (tiny_model_dir, tiny_tokenizer_dir)
        for file in folder.iterdir()
    }
    extra = ("pytorch_model.bin", "README.md", "onnx/model.onnx", "modeling_own.py")
    return found | dict.fromkeys(extra, b"not asked for")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    shutil.copy(REPOSITORY / "dvc.yaml", folder)
    return folder


def fetch(root: Path, commit: str, *stages: str) -> None:
    model = {"model_name_or_path": MODEL, "revision": commit, "trust_remote_code": False}
    lora = {"adapter_name_or_path": None, "adapter_revision": None}
    (root / "params.yaml").write_text(json.dumps({"model": model, "lora": lora}))
    mains = {"fetch_tokenizer": fetch_tokenizer.main, "fetch_model": fetch_model.main}
    for name in stages or mains:
        run_stage(name, mains[name], root)


def weights(root: Path) -> bytes:
    return (root / "data/models/base/model.safetensors").read_bytes()


def test_only_what_is_needed_is_downloaded(hub: Hub, root: Path, files: dict[str, bytes]) -> None:
    commit = hub.commit(f"models/{MODEL}", files)
    fetch(root, commit, "fetch_tokenizer")
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "config.json"}  # its number of rows
    assert set(hub.files_sent()) == tokenizer
    fetch(root, commit, "fetch_model")
    model = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(hub.files_sent()) == model | tokenizer
    assert weights(root) == files["model.safetensors"]


def test_a_cut_connection_goes_on_where_it_was_cut(
    hub: Hub, root: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last whole chunk, which is of 10 MiB in real life."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    commit = hub.commit(f"models/{MODEL}", files)
    hub.faults = [Fault("GET /cdn/", cut_after=1000)]
    fetch(root, commit, "fetch_model")
    assert weights(root) == files["model.safetensors"]
    assert [a.range for a in hub.asked if str(a).startswith("GET /cdn/")] == [None, "bytes=1000-"]


@pytest.mark.parametrize("request_", ["GET /api/.*/tree/", "HEAD /org/tiny/resolve", "GET /cdn/"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(
    hub: Hub, root: Path, files: dict[str, bytes], request_: str, status: int
) -> None:
    commit = hub.commit(f"models/{MODEL}", files)
    hub.faults = [Fault(request_, status=status, headers={"Retry-After": "0"})]
    fetch(root, commit, "fetch_model")
    assert hub.faults[0].times == 0
    assert weights(root) == files["model.safetensors"]


def test_the_hub_says_how_long_to_wait(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    hub.commit(f"models/{MODEL}", {"config.json": b"{}"})
    hub.faults = [
        Fault("GET /api", status=429, headers={"Retry-After": "7"}),
        Fault("GET /api", status=429, headers={"RateLimit": '"api";r=0;t=41'}),
        Fault("GET /api", status=429, headers={"Retry-After": "86400"}),
    ]
    client.Repository("model", MODEL, "model.model_name_or_path").commit("main")
    assert slept == [7.0, 42.0, client.LONGEST_WAIT_SECONDS]


def test_the_client_alone_does_not_ask_again(hub: Hub) -> None:
    """Where it does one day, capas.hub.repository can do with less."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    commit = hub.commit(f"models/{MODEL}", {"config.json": b"{}"})
    hub.faults = [Fault("GET /api", status=429, times=2)]
    for ask in (HfApi().repo_info, HfApi().list_repo_files):
        with pytest.raises(HfHubHTTPError, match="429"):
            ask(MODEL, revision=commit)


def test_what_is_no_hub_is_said(hub: Hub, root: Path) -> None:
    hub.faults = [Fault("GET /api", status=200)]  # as a hotel's page to log in
    with pytest.raises(CapasError, match=r"org/tiny.* is not a Hub\nCheck HF_ENDPOINT"):
        fetch(root, "0" * 40)


def test_a_hub_that_stays_busy_is_an_error(hub: Hub, root: Path) -> None:
    commit = hub.commit(f"models/{MODEL}", {"config.json": b"{}"})
    hub.faults = [Fault("GET /api", status=503, times=9)]
    with pytest.raises(CapasError, match=r"org/tiny at \w{40} could not be downloaded: .*503"):
        fetch(root, commit)


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        ({"gated": True}, None, r"it is gated, and nobody is logged in\nAccept its conditions on "
         r"https://huggingface.co/org/tiny; log in with `hf auth login`, or set HF_TOKEN"),
        ({"gated": True}, "hf_other", r"it is gated, and your account does not have access yet"),
        ({"private": True}, None, r"no model of that name, or it is private\n.*`hf auth login`"),
        ({"private": True}, "hf_other", r"does not accept your token"),
    ],
)  # fmt: skip
def test_who_may_not_see_it_is_told_how_to(
    hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch, options: Any, token: str, message: str
) -> None:
    commit = hub.commit(f"models/{MODEL}", {"tokenizer.json": b"{}"}, **options)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CapasError, match=message) as refusal:
        fetch(root, commit)
    assert str(refusal.value).startswith("model.model_name_or_path=org/tiny at ")
    assert "hf_other" not in str(refusal.value)


def test_what_is_not_there_is_said(hub: Hub, root: Path) -> None:
    with pytest.raises(CapasError, match="the Hub has no model of that name, or it is private"):
        fetch(root, "0" * 40)
    hub.commit(f"models/{MODEL}", {"config.json": b"{}"})
    with pytest.raises(CapasError, match=r"it has no commit, branch or tag 0{40}"):
        fetch(root, "0" * 40)


def test_a_moved_branch_changes_nothing_at_a_commit(
    hub: Hub, root: Path, files: dict[str, bytes]
) -> None:
    commit = hub.commit(f"models/{MODEL}", files)
    hub.commit(f"models/{MODEL}", files | {"model.safetensors": b"of tomorrow"})
    fetch(root, commit)
    assert weights(root) == files["model.safetensors"]


def test_the_second_run_needs_no_network(
    hub: Hub, root: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit(f"models/{MODEL}", files)
    fetch(root, commit)
    shutil.rmtree(root / "data")
    hub.asked.clear()
    go_offline(monkeypatch)
    fetch(root, commit)
    assert (hub.asked, weights(root)) == ([], files["model.safetensors"])
    with pytest.raises(CapasError, match=r"(?s)could not be downloaded.*offline.*model=embedded"):
        fetch(root, "1" * 40)


def test_a_hub_that_is_gone_is_said_in_words(hub: Hub, root: Path) -> None:
    hub.__exit__()
    with pytest.raises(CapasError, match=r"(?s)could not be downloaded: .*Without a network, use"):
        fetch(root, "1" * 40)


def test_weights_as_pickle_are_refused_and_not_downloaded(
    hub: Hub, root: Path, files: dict[str, bytes]
) -> None:
    del files["model.safetensors"]
    commit = hub.commit(f"models/{MODEL}", files)
    with pytest.raises(CapasError, match=r"org/tiny has its weights only as pytorch_model.bin"):
        fetch(root, commit, "fetch_model")
    assert "pytorch_model.bin" not in hub.files_sent()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_came_damaged_is_refused(
    hub: Hub, root: Path, files: dict[str, bytes], name: str
) -> None:
    """Of the right size: the client itself compares no content."""
    commit = hub.commit(f"models/{MODEL}", files)
    where = "GET /cdn/" if name == "model.safetensors" else f"GET .*{name}"
    hub.faults = [Fault(where, change=lambda body: body[:-1] + bytes([body[-1] ^ 1]))]
    with pytest.raises(CapasError, match=rf"{name} is damaged.*run again: rm (\S+)") as refusal:
        fetch(root, commit, "fetch_model")
    Path(str(refusal.value).rpartition(" ")[2]).unlink()
    fetch(root, commit, "fetch_model")
    assert weights(root) == files["model.safetensors"]


def test_a_cache_may_keep_its_files_elsewhere(
    hub: Hub, root: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Under names that are other hashes: what counts is the name that the Hub gave."""
    commit = hub.commit(f"models/{MODEL}", files)
    fetch(root, commit, "fetch_model")
    store = tmp_path / "store"
    store.mkdir()
    blobs = list((tmp_path / "home/hub").rglob("blobs/*"))
    for i, blob in enumerate(blobs):
        blob.rename(store / f"{i:064}")
        blob.symlink_to(store / f"{i:064}")
    shutil.rmtree(root / "data")
    fetch(root, commit, "fetch_model")
    assert len(blobs) == 3
    assert weights(root) == files["model.safetensors"]


def test_a_file_that_came_too_short_is_refused(
    hub: Hub, root: Path, files: dict[str, bytes]
) -> None:
    commit = hub.commit(f"models/{MODEL}", files)
    hub.faults = [Fault("GET /cdn/", change=lambda body: body[:-1])]
    with pytest.raises(CapasError, match="Consistency check failed: file should be of size"):
        fetch(root, commit, "fetch_model")


def test_a_private_model_needs_the_token_and_no_one_else_gets_it(
    hub: Hub, root: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit(f"models/{MODEL}", files, private=True)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", SECRET)
    fetch(root, commit)
    assert weights(root) == files["model.safetensors"]
    assert {(a.host, a.token) for a in hub.asked} == {("127.0.0.1", SECRET), ("localhost", None)}


def test_rows_of_a_split_come_from_its_files_alone(hub: Hub) -> None:
    commit = hub.commit(f"datasets/{DATASET}", QUESTIONS)
    assert list(read_split(DATASET, "main", commit, "train")) == ROWS
    sent = ["README.md", "main/train-0.parquet", "main/train-1.parquet"]
    assert sorted(hub.files_sent()) == sent
    assert list(read_split(DATASET, "hard", commit, "train")) == ROWS[:1]


def test_of_parquet_only_the_needed_columns_are_read(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"q{n}", "answer": f"a{n}", "page": "x" * n, "id": n} for n in range(7)]
    files = {f"train-{i}.parquet": parquet(rows[3 * i : 3 * i + 3]) for i in range(3)}
    commit = hub.commit("datasets/org/wide", files)
    asked: list[Any] = []
    batches = pq.ParquetFile.iter_batches

    def iter_batches(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["columns"])
        return batches(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    needed = composed(
        (
            "dataset=gsm8k",
            "dataset.path=org/wide",
            "dataset.name=null",
            f"dataset.revision='{commit}'",
        )
    )
    [source] = sources_of(Params({**needed["dataset"], "split": "train"}), Path())
    [(_, found)] = source.splits()
    wanted = [{k: row[k] for k in ("question", "answer", "id")} for row in rows]
    assert [row.value for row in found] == wanted
    assert asked == [["question", "answer", "id"]] * 3
    assert source.unread() == {"page": 7}


def test_a_data_set_is_read_again_without_a_network_at_its_commit(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` alone would give the latest commit that it has; and here the latest is another one."""
    commit = hub.commit(f"datasets/{DATASET}", QUESTIONS)
    later = hub.commit(f"datasets/{DATASET}", QUESTIONS | {"main/train-0.parquet": parquet(ROWS)})
    assert len(list(read_split(DATASET, "main", commit, "train"))) == 10
    assert len(list(read_split(DATASET, "main", later, "train"))) == 14
    hub.asked.clear()
    go_offline(monkeypatch)
    assert list(read_split(DATASET, "main", commit, "train")) == ROWS
    assert hub.asked == []
    with pytest.raises(CapasError, match=r"(?s)could not be downloaded.*dataset=embedded"):
        next(read_split(DATASET, "main", commit, "test"))  # a split that was never downloaded


def test_a_split_of_which_a_file_is_missing_is_not_read_in_part(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit(f"datasets/{DATASET}", QUESTIONS)
    hub.faults = [Fault("GET /cdn/", status=404, skip=1)]
    with pytest.raises(CapasError, match="could not be downloaded"):
        next(read_split(DATASET, "main", commit, "train"))
    go_offline(monkeypatch)
    with pytest.raises(CapasError, match="could not be downloaded"):
        next(read_split(DATASET, "main", commit, "train"))


def test_data_survive_a_cut_connection_and_a_busy_hub(hub: Hub) -> None:
    commit = hub.commit(f"datasets/{DATASET}", QUESTIONS)
    hub.faults = [
        Fault("GET /cdn/", cut_after=100),
        Fault("GET /api", status=429, headers={"Retry-After": "0"}),
    ]
    assert list(read_split(DATASET, "main", commit, "train")) == ROWS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((None, "train"), "dataset.name=null: org/questions has the configurations main, hard"),
        (("easy", "train"), "dataset.name=easy: org/questions has the configurations main, hard"),
        (("main", "dev"), "dataset.split=dev: org/questions has the splits train, test in"),
        (("main", None), "dataset.split=null: org/questions has the splits train, test in"),
    ],
)
def test_the_known_configurations_and_splits_are_named(
    hub: Hub, asked: tuple[str, str], message: str
) -> None:
    commit = hub.commit(f"datasets/{DATASET}", QUESTIONS)
    with pytest.raises(CapasError, match=message):
        next(read_split(DATASET, asked[0], commit, asked[1]))
    assert not any(name.endswith(".parquet") for name in hub.files_sent())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"questions.py": b"import os", "train.csv": b"a\n1\n"},
            r"own loading script questions\.py",
        ),
        ({"README.md": b"# nothing"}, "holds no data files that `datasets` can read"),
        ({"README.md": b"---\nconfigs: [\n---\n", "train.csv": b"a\n1\n"}, "cannot read it"),
        ({"train.parquet": b"PAR1 and no more"}, "a data file cannot be read"),
        ({"train.jsonl": b'{"a": 1}\n{"a": \n'}, "a data file cannot be read"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_refused(
    hub: Hub, content: dict[str, bytes], message: str
) -> None:
    commit = hub.commit(f"datasets/{DATASET}", content)
    with pytest.raises(CapasError, match=rf"dataset.path=org/questions.*{message}"):
        list(read_split(DATASET, None, commit, "train"))


@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_a_data_set_needs_a_commit(revision: str | None) -> None:
    with pytest.raises(CapasError, match=r"dataset.revision=\w+ is not a commit"):
        next(read_split(DATASET, None, revision, "train"))


def test_a_private_data_set_needs_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.commit(f"datasets/{DATASET}", QUESTIONS, private=True)
    with pytest.raises(CapasError, match="the Hub has no dataset of that name, or it is private"):
        next(read_split(DATASET, "main", commit, "train"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert list(read_split(DATASET, "main", commit, "train")) == ROWS
    assert {a.token for a in hub.asked if a.host == "localhost"} == {None}


def test_a_gated_data_set_names_its_page(hub: Hub) -> None:
    commit = hub.commit(f"datasets/{DATASET}", QUESTIONS, gated=True)
    with pytest.raises(CapasError, match=r"gated.*\n.*huggingface.co/datasets/org/questions"):
        next(read_split(DATASET, "main", commit, "train", "dataset.mix[1]"))


def files_with(folder: Path, text: str) -> list[str]:
    found = [f for f in folder.rglob("*") if f.is_file() and text.encode() in f.read_bytes()]
    return [str(file.relative_to(folder)) for file in found]


def test_the_token_and_the_address_reach_no_file_and_no_line(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    """A private model through `dvc repro`, then once more without a network."""
    workspace = make_workspace(tmp_path / "workspace")
    with Hub(tokens=(SECRET,)) as hub:
        commit = hub.commit(f"models/{MODEL}", files, private=True)
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": SECRET}
        workspace.edit("conf/model/embedded.yaml", ": data/embedded", f": {MODEL}")
        log = workspace.repro("fetch_tokenizer", "fetch_model", **env, HF_HUB_OFFLINE="0")
        assert f"{MODEL}@main to {commit}" in log
        assert weights(workspace.root) == files["model.safetensors"]
        hub.asked.clear()
        log += workspace.repro("-f", "-s", "fetch_model", HF_HOME=env["HF_HOME"])
        assert (hub.asked, weights(workspace.root)) == ([], files["model.safetensors"])
    assert files_with(workspace.root, commit) != []
    assert files_with(workspace.root, SECRET) == files_with(workspace.root, hub.url) == []
    assert SECRET not in log


def test_the_token_reaches_no_run_in_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = write_inputs(tmp_path)
    publish(root)
    assert files_with(root, "lora.r") != []
    assert (root / "mlflow.db").exists()
    assert files_with(root, SECRET) == []


CASES = {
    "org/configs": (QUESTIONS, "main", "train"),
    "org/json": ({"train.jsonl": jsonl(ROWS), "test.jsonl": jsonl(ROWS[:2])}, None, "test"),
    "org/zipped": ({"data/train.jsonl.gz": gzip.compress(jsonl(ROWS))}, None, "train"),
    "org/shards": (
        {f"data/validation-0000{i}-of-00002.parquet": parquet(ROWS[i::2]) for i in range(2)},
        None,
        "validation",
    ),
    "org/csv": ({"README.md": SEMICOLON, "d.csv": b"question;answer\n1;x\n2;y\n"}, None, "train"),
    "org/label": (
        {"README.md": LABEL, "train.jsonl": b'{"kind": 1}\n{"kind": 0}\n'},
        None,
        "train",
    ),
}
COMPARE = """
import json, sys
from datasets import load_dataset
from capas.dataset.hub import read_split
for path, commit, name, split in json.loads(sys.argv[1]):
    theirs = list(load_dataset(path, name, revision=commit, split=split, streaming=True))
    print(len(theirs), path, list(read_split(path, name, commit, split)) == theirs)
"""


def test_rows_are_those_that_load_dataset_gives(tmp_path: Path) -> None:
    with Hub() as hub:
        asked = [
            (path, hub.commit(f"datasets/{path}", files), name, split)
            for path, (files, name, split) in CASES.items()
        ]
        found = in_python(COMPARE, json.dumps(asked), HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    counts = dict(zip(CASES, (10, 2, 10, 10, 2, 2), strict=True))
    assert found.split("\n")[:-1] == [f"{n} {path} True" for path, n in counts.items()]


def in_python(code: str, *arguments: str, **env: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "0", **env},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


PEAK = """
import sys
from capas.dataset.hub import read_split
num_rows = sum(1 for row in read_split("org/big", None, sys.argv[1], "train"))
print(num_rows, open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    """Not even where a file is one row group of 200 MB."""
    sizes, peaks = (20_000, 400_000), []
    with Hub() as hub:
        for num_rows in sizes:
            rows = pa.table({"text": [f"{i:0500}" for i in range(num_rows)]})
            buffer = io.BytesIO()
            pq.write_table(rows, buffer, row_group_size=num_rows, compression="none")
            commit = hub.commit("datasets/org/big", {"train.parquet": buffer.getvalue()})
            found = in_python(PEAK, commit, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path)).split()
            assert int(found[0]) == num_rows
            peaks.append(int(found[1]) * 1024)
    assert peaks[1] - peaks[0] < 80e6  # 10 MB at a time are downloaded, and allocators keep some
