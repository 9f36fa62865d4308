"""What a run in MLflow says of where it comes from."""

import copy
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from published import publish, the_run
from report_inputs import REPOSITORY, write_inputs

from capas.core.dag import read_yaml, recorded_key
from capas.core.errors import CapasError
from capas.core.worktree import git
from capas.tracking import lineage, runs
from capas.tracking.store import Store
from capas.workspace.rebuild import lay_out
from capas.workspace.reproduced import differences

ZERO = "0" * 32


@pytest.fixture(scope="module")
def committed(empty_mlflow_db: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result in a git repository; the outputs of DVC are ignored."""
    folder = write_inputs(tmp_path_factory.mktemp("committed"))
    (folder / ".gitignore").write_text(
        "/.dvc\n/data/*\n!/data/own\n/reports\n/mlflow.db\n/mlartifacts\n"
    )
    (folder / "code.py").write_text("print(1)\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "Ana")
    git(folder, "config", "user.email", "ana@example.org")
    commit(folder)
    shutil.copy(empty_mlflow_db, folder / "mlflow.db")
    return folder


@pytest.fixture
def root(committed: Path, tmp_path: Path) -> Iterator[Path]:
    folder = shutil.copytree(committed, tmp_path / "root", symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        names = ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_ROOT")
        for name in names:
            patch.delenv(name, raising=False)
        keys = {n: recorded_key(e) for n, e in read_yaml(folder / "dvc.lock")["stages"].items()}
        # The md5 in this dvc.lock are made up.
        patch.setattr(lineage, "input_key", lambda spec, _: keys[spec.name])
        yield folder


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "-q", "-m", "test")


def evaluate_anew(root: Path, md5: str = ZERO) -> None:
    lock = read_yaml(root / "dvc.lock")
    lock["stages"]["evaluate"]["outs"][0]["md5"] = md5
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))


def kept(root: Path) -> tuple[dict[str, str], lineage.State]:
    store, found = the_run(root)
    shown = ("git.", "adapter.", "dvc.", "mlflow.runName", "mlflow.source.", "mlflow.user")
    tags = {name: value for name, value in found.tags.items() if name.startswith(shown)}
    return tags, lineage.read_state(store.client, found)


def restored(root: Path, state: lineage.State, target: Path) -> str:
    """The tree that the kept state leads to, in a clone of the commit."""
    lay_out(root, target, state)
    return git(target, "write-tree")


def test_a_committed_state_needs_no_patch(root: Path) -> None:
    publish(root)
    tags, state = kept(root)
    assert tags["git.base"] == tags["mlflow.source.git.commit"] == git(root, "rev-parse", "HEAD")
    assert (tags["git.tree"], tags["git.dirty"]) == (git(root, "rev-parse", "HEAD^{tree}"), "false")
    assert len(tags["adapter.sha256"]) == 64
    store, found = the_run(root)
    assert not store.client.list_artifacts(found.id, "source")
    assert state.patch == b"" and state.ignored == {}


def test_what_is_not_committed_is_kept_whole(root: Path, tmp_path: Path) -> None:
    (root / "code.py").write_text("print(2)")
    (root / "ñ.bin").write_bytes(bytes(range(256)))
    publish(root)
    tags, state = kept(root)
    assert tags["git.dirty"] == "true"
    assert restored(root, state, tmp_path / "clone") == tags["git.tree"] == state.taken.tree


SECRETS = (
    ".env",
    "sub/.env.local",
    "server.pem",
    "id_rsa",
    "credentials.json",
    ".netrc",
    "hf_token",
)


def test_what_may_hold_a_secret_or_is_large_stays_here_and_what_travels_is_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lineage, "MAX_FILE_BYTES", 2**20)
    (root / "sub").mkdir()
    for name in SECRETS:
        (root / name).write_text("TOKEN=hidden")
    (root / "large.bin").write_bytes(bytes(2**20 + 1))
    (root / ".env.example").write_text("TOKEN=")
    (root / "tokenizer.json").write_text("{}")
    caplog.set_level("INFO", "capas")
    publish(root)
    tags, state = kept(root)
    assert b"hidden" not in state.patch
    assert restored(root, state, tmp_path / "clone") == tags["git.tree"]
    there = {file.name for file in (tmp_path / "clone").iterdir()}
    assert {".env.example", "tokenizer.json"} <= there
    assert not there & {*SECRETS, "large.bin"}
    assert "saved with the run in MLflow: .env.example, tokenizer.json" in caplog.text
    (stayed,) = (text for text in caplog.messages if "not sent to MLflow" in text)
    assert all(name in stayed for name in (*SECRETS, "large.bin"))
    assert git(root, "status", "--porcelain", "sub") == "?? sub/"  # the user's index is his own
    assert "git.left_out" not in tags


TOKEN = "hf_" + "aB3" * 10


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        (f"login(token='{TOKEN}')\n", True),
        (f"curl -H 'Authorization: Bearer {TOKEN}' https://h/x\n", True),
        ("export GH=ghp_" + "x1" * 18, True),
        ("glpat-" + "x-1" * 8, True),
        ('{"aws": "AKIA' + "Z" * 16 + '"}', True),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n", True),
        (f"ñ \xff {TOKEN}", True),
        ("hf_hub_download('openai/gsm8k')\nhf_token = os.environ['HF_TOKEN']\n", False),
        ("pip install git+ssh://git@github.com/org/name?key=abc\n", False),
        (f"\0\0{TOKEN}", False),  # binary
    ],
)
def test_a_text_with_a_token_stays_here(tmp_path: Path, text: str, stays: bool) -> None:
    file = tmp_path / "notes.py"
    file.write_bytes(text.encode("latin-1"))
    assert lineage.travels(file) is not stays


def test_a_token_in_a_file_of_any_name_does_not_travel(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "try_it.py").write_text(f"token = '{TOKEN}'\n")
    (root / "plain.py").write_text("token = None\n")
    caplog.set_level("INFO", "capas")
    publish(root)
    _, state = kept(root)
    assert TOKEN.encode() not in state.patch and b"plain.py" in state.patch
    (stayed,) = (text for text in caplog.messages if "not sent to MLflow" in text)
    assert "try_it.py" in stayed and "plain.py" not in stayed


def test_a_run_that_needs_a_file_which_stayed_says_so(root: Path) -> None:
    secret = root / "conf/secret.yaml"
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("a: 1")
    publish(root)
    store, found = the_run(root)
    assert found.tags["git.left_out"] == "conf/secret.yaml"
    with pytest.raises(CapasError, match=r"not saved with the run: conf/secret\.yaml"):
        lineage.read_state(store.client, found)


def test_a_state_is_replaced_whole_and_only_with_its_artifacts(root: Path, tmp_path: Path) -> None:
    (root / "code.py").write_text("print(2)\n")
    publish(root)
    before = kept(root)
    (root / "code.py").write_text("print(3)\n")
    publish(root)
    assert kept(root) == before

    evaluate_anew(root)
    publish(root)
    tags, state = kept(root)
    assert tags["git.tree"] != before[0]["git.tree"]
    assert restored(root, state, tmp_path / "clone") == tags["git.tree"]

    evaluate_anew(root, "1" * 32)
    commit(root)
    publish(root)
    tags, state = kept(root)
    assert tags["git.dirty"] == "false" and state.patch == b""
    assert state.taken.commit == git(root, "rev-parse", "HEAD")


def test_a_publish_killed_between_files_and_tags_leaves_a_state_that_is_whole(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "code.py").write_text("print(2)\n")
    publish(root)
    (root / "code.py").write_text("print(3)\n")
    evaluate_anew(root)

    def killed(_: Store, run: Any, tags: Mapping[str, str]) -> None:
        if lineage.TREE in tags:
            raise CapasError("killed")

    with monkeypatch.context() as patch, pytest.raises(CapasError, match="killed"):
        patch.setattr(Store, "send_tags", killed)
        publish(root)
    tags, state = kept(root)
    assert restored(root, state, tmp_path / "clone") == state.taken.tree != tags["git.tree"]


def test_an_accepted_result_keeps_the_state_that_records_its_training(root: Path) -> None:
    publish(root)
    before = kept(root)
    lock = read_yaml(root / "dvc.lock")
    lock["stages"]["train"]["deps"][0]["md5"] = ZERO
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    evaluate_anew(root)
    publish(root)
    assert kept(root) == before


def test_an_input_that_git_ignores_is_named_with_its_md5(root: Path) -> None:
    own = root / "data/own"
    own.mkdir()
    (own / ".gitignore").write_text("*\n!.gitignore\n")
    (own / "mine.csv").write_text("a,b\n")
    publish(root)
    tags, state = kept(root)
    assert tags["git.ignored"] == "data/own/mine.csv"
    md5 = hashlib.md5(b"a,b\n", usedforsecurity=False).hexdigest()
    assert state.ignored == {"data/own/mine.csv": md5}


def test_what_dvcignore_names_is_no_input(root: Path) -> None:
    (root / ".dvcignore").write_bytes((REPOSITORY / ".dvcignore").read_bytes())
    with (root / ".git/info/exclude").open("a") as exclude:  # as in the git settings of many users
        exclude.write("*.swp\n.DS_Store\n/conf/own.yaml\n")
    conf = root / "conf/trainer"
    conf.mkdir(parents=True)
    for file in (conf / "._base.yaml.swp", conf / ".DS_Store", root / "conf/own.yaml"):
        file.write_text("1\n")
    publish(root)
    assert list(kept(root)[1].ignored) == ["conf/own.yaml"]


def test_an_experiment_has_its_name_and_its_base(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = git(root, "rev-parse", "HEAD")
    (root / "code.py").write_text("print(2)\n")
    commit(root)  # as DVC does for as long as an experiment runs
    monkeypatch.setenv("DVC_EXP_NAME", "tried")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", base)
    publish(root)
    tags, state = kept(root)
    assert tags["dvc.experiment"] == "tried"
    assert tags["mlflow.runName"] == "embedded r16 lr4e-3 (tried)"
    assert state.taken.commit == tags["git.base"] == base
    assert b"print(2)" in state.patch


def test_an_experiment_that_was_pulled_keeps_its_name_and_its_author(root: Path) -> None:
    head = git(root, "rev-parse", "HEAD")
    git(root, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/pulled", head)
    git(root, "config", "user.name", "who pulled")
    publish(root)
    tags, _ = kept(root)
    assert tags["dvc.experiment"] == "pulled"
    assert tags["mlflow.runName"] == "embedded r16 lr4e-3 (pulled)"
    assert tags["mlflow.user"] == "Ana"


def test_a_folder_of_a_repository_is_named(empty_mlflow_db: Path, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "config", "user.name", "Ana")
    git(tmp_path, "config", "user.email", "ana@example.org")
    (tmp_path / "beside").write_text("1\n")
    folder = tmp_path / "sub"
    folder.mkdir()
    write_inputs(folder)
    shutil.copy(empty_mlflow_db, folder / "mlflow.db")
    (folder / ".gitignore").write_text("/.dvc\n/data\n/reports\n/mlflow.db\n/mlartifacts\n")
    commit(tmp_path)
    (tmp_path / "beside").write_text("2\n")
    publish(folder)
    tags, state = kept(folder)
    assert tags["git.folder"] == "sub"
    assert b"a/beside" in state.patch


def test_outside_git_it_says_so(
    empty_mlflow_db: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(empty_mlflow_db, tmp_path / "mlflow.db")
    publish(write_inputs(tmp_path))
    assert "cannot be rebuilt from MLflow" in caplog.text
    store, found = the_run(tmp_path)
    assert found.status == "FINISHED"
    assert found.tags["git.base"] == "unknown"
    with pytest.raises(CapasError, match="outside a git repository"):
        lineage.read_state(store.client, found)


def test_a_patch_without_end_is_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "MAX_PATCH_BYTES", 1000)
    (root / "large.bin").write_bytes(Random(0).randbytes(5000))
    publish(root)
    store, found = the_run(root)
    with pytest.raises(CapasError, match=r"not saved with the run: source/uncommitted\.patch"):
        lineage.read_state(store.client, found)


def test_a_script_edited_after_it_ran_is_told_and_replaces_no_state(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(root)
    before = kept(root)
    monkeypatch.setattr(lineage, "input_key", lambda spec, _: spec.name)
    evaluate_anew(root)
    publish(root)
    assert "edited after the stages ran: fetch" in caplog.text
    assert kept(root) == before


def test_a_patch_that_is_not_of_the_state_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "code.py").write_text("print(2)\n")
    publish(root)
    _, state = kept(root)
    wrong = replace(state, patch=state.patch.replace(b"+print(2)", b"+print(4)"))
    with pytest.raises(CapasError, match="the patch belongs to another run"):
        lay_out(root, tmp_path / "one", wrong)
    gone = replace(state, taken=state.taken._replace(commit="1" * 40))
    with pytest.raises(CapasError, match=f"commit {'1' * 40} is not in this repository"):
        lay_out(root, tmp_path / "two", gone)


def test_a_run_is_found_by_what_it_is_called(root: Path) -> None:
    publish(root)
    store, found = the_run(root)
    for word in (found.id, found.id[:6], found.name):
        assert runs.find(store.client, word, root).id == found.id
    with pytest.raises(CapasError, match=r"no training run 'x'\. Training runs: 1, the newest"):
        runs.find(store.client, "x", root)
    store.client.create_run(store.experiment_id, tags={"train_key": "k"}, run_name="twin")
    store.client.create_run(store.experiment_id, tags={"train_key": "l"}, run_name="twin")
    store.client.create_run(store.experiment_id, run_name="no training")
    with pytest.raises(CapasError, match="'twin' matches 2 runs"):
        runs.find(store.client, "twin", root)
    with pytest.raises(CapasError, match="Training runs: 3"):
        runs.find(store.client, "no training", root)


def test_the_first_stage_that_differs_comes_first(root: Path) -> None:
    before = read_yaml(root / "dvc.lock")["stages"]
    after = copy.deepcopy(before)
    assert differences(before, after) == []
    after["train"]["deps"][-1]["md5"] = ZERO
    for name in ("train", "format"):
        after[name]["outs"][0]["md5"] = ZERO
    first, second = differences(before, after)
    assert first == "first to differ: format: data/formatted"
    assert (
        second
        == f"differs too: train: data/models/adapter, from different {after['train']['deps'][-1]['path']}"
    )


def test_git_that_is_gone_leaves_the_state(root: Path) -> None:
    publish(root)
    before = kept(root)
    (root / ".git").rename(root / "gone")
    evaluate_anew(root)
    publish(root)
    assert kept(root) == before
