"""Two people: a bare git repository and a remote of DVC between them, a folder or S3."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from publishing import Publisher
from workspace import Workspace, make_workspace, stages_run

from capas.core.worktree import git
from capas.tracking.store import Store

pytestmark = pytest.mark.slow
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module", params=["folder", "s3"])
def remote(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[tuple[str, ...]]]:
    """The commands of DVC that set it up."""
    if request.param == "folder":
        yield [("add", "-d", "team", str(tmp_path_factory.mktemp("remote")))]
        return
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="team")
        yield [("add", "-d", "team", "s3://team/capas"), ("modify", "team", "endpointurl", url)]
    server.stop()


@pytest.fixture(scope="module")
def ana(tmp_path_factory: pytest.TempPathFactory, remote: list[tuple[str, ...]]) -> Publisher:
    """She has trained, published and pushed."""
    folder = tmp_path_factory.mktemp("team")
    made = Publisher.make_published(folder / "ana")
    share(made, folder / "origin.git", remote)
    return made


def share(workspace: Workspace, origin: Path, remote: list[tuple[str, ...]]) -> None:
    for words in remote:
        workspace.run("dvc", "remote", *words)
    git(origin.parent, "init", "-q", "--bare", "-b", "main", str(origin))
    workspace.run("git", "add", "-A")
    workspace.run("git", "commit", "-q", "-m", "A remote")
    workspace.run("git", "remote", "add", "origin", str(origin))
    workspace.run("git", "push", "-q", "origin", "main")
    workspace.run("dvc", "push")


@pytest.fixture
def ben(ana: Publisher, tmp_path: Path) -> Publisher:
    """He has cloned."""
    git(tmp_path, "clone", "-q", git(ana.root, "remote", "get-url", "origin"), "ben")
    for name, value in {"user.name": "Ben", "user.email": "ben@example.org"}.items():
        git(tmp_path / "ben", "config", name, value)
    return Publisher(tmp_path / "ben")


def tags(publisher: Publisher) -> dict[str, str]:
    (run,) = publisher.the_run()[0].search_runs(["1"])
    found: dict[str, str] = run.tags
    return found


def test_a_newcomer_pulls_runs_publish_alone_and_has_the_run(
    ana: Publisher, ben: Publisher
) -> None:
    ben.run("dvc", "pull")
    assert stages_run(ben.repro()) == ["publish"]
    assert ben.ran() == {}
    assert git(ben.root, "status", "--porcelain") == ""
    hers, his = tags(ana), tags(ben)
    for name in ("train_key", "adapter.sha256", "mlflow.runName"):
        assert his[name] == hers[name]
    assert (his["git.base"], his["git.dirty"]) == (git(ana.root, "rev-parse", "HEAD"), "false")
    assert ben.capas("rebuild", his["mlflow.runName"], FAKE_HOME=str(ben.root)) == 0
    assert ben.ran()["train"] == 1


def test_a_rebuild_pulls_what_is_not_here(
    ana: Publisher, ben: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    ben.run("dvc", "pull")
    ben.repro()
    ben.run("rm", "-rf", ".dvc/cache", "data/models", "data/raw")
    name = tags(ben)["mlflow.runName"]
    assert ben.capas("rebuild", name, "--restore", FAKE_HOME=str(ben.root)) == 0
    assert "pulling data/models/adapter" in capsys.readouterr().err
    assert ben.ran() == {}
    ben.run("rm", "-rf", ".dvc/cache")
    assert ben.capas("rebuild", name, FAKE_HOME=str(ben.root)) == 0
    assert "train" in ben.ran() and "fetch" not in ben.ran()


def test_an_experiment_is_pushed_pulled_adopted_and_rebuilt(ana: Publisher, ben: Publisher) -> None:
    ana.run("dvc", "exp", "run", "-n", "tried", "-S", "lora.r=2")
    hers = ana.the_run()[1]
    assert hers.tags["dvc.experiment"] == "tried"
    assert hers.name.endswith("(tried)")
    ana.run("dvc", "exp", "push", "origin", "tried")
    ana.run("git", "checkout", "-q", ".")
    ben.run("dvc", "pull")
    ben.run("dvc", "exp", "pull", "origin", "tried")
    ben.run("dvc", "exp", "apply", "tried")
    assert stages_run(ben.repro()) == ["publish"]
    his = ben.the_run()[1].tags
    assert his["train_key"] == hers.tags["train_key"]
    assert his["adapter.sha256"] == hers.tags["adapter.sha256"]
    ben.run("git", "checkout", "-q", ".")
    assert ben.capas("rebuild", "tried", FAKE_HOME=str(ben.root)) == 0
    assert ben.ran()["train"] == 1


def the_only_run(workspace: Workspace) -> Any:
    client = Store.open(workspace.root, "capas").client
    (run,) = client.search_runs(["1"])
    return run


def test_the_real_pipeline_in_a_second_clone(tmp_path: Path) -> None:
    """With uncommitted edits, an untracked file and a binary one; then from the newcomer's run back."""
    (tmp_path / "ana").mkdir()
    ana = make_workspace(tmp_path / "ana")
    ana.edit("conf/config.yaml", "experiment: none", "experiment: quick")
    ana.repro()
    share(ana, tmp_path / "origin.git", [("add", "-d", "team", str(tmp_path / "remote"))])
    git(tmp_path, "clone", "-q", "origin.git", "ben")
    ben = Workspace(tmp_path / "ben")
    ben.run("dvc", "pull")
    assert stages_run(ben.repro()) == ["publish"]
    assert ben.run("git", "status", "--porcelain") == ""
    hers, his = the_only_run(ana), the_only_run(ben)
    assert his.name == hers.name
    assert his.tags["adapter.sha256"] == hers.tags["adapter.sha256"]
    assert his.params == hers.params

    (ben.root / "untracked.bin").write_bytes(bytes(range(256)))
    ben.edit("conf/lora/_base.yaml", "r: 16", "r: 4")
    image = ben.root / "data/embedded/README.md"
    image.write_bytes(image.read_bytes() + b"\0\xff")
    ben.repro()
    ben.run("git", "checkout", "-q", ".")
    ben.run("git", "clean", "-qfd")
    client = Store.open(ben.root, "capas").client
    run = client.search_runs(["1"])[0]
    assert run.params["lora.r"] == "4"
    said = ben.run("python", "-m", "capas", "rebuild", run.id)
    assert "The adapter is identical, byte for byte" in said
    assert ben.run("git", "status", "--porcelain") == ""
