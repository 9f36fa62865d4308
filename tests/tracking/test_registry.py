"""`capas register`: which runs become a version of the registry, and what a version says of itself."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capas import __main__ as cli
from capas.core.errors import CapasError
from capas.tracking.registry import RefusedError, register
from capas.tracking.store import Store, tracking_uri

FAILED = "failed: stop_rate 0.5 is below evaluation.gate.min_stop_rate = 0.9"
Make = Callable[..., str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    root = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT", "CAPAS_HOME"):
            patch.delenv(name, raising=False)
        yield Store.open(root, "capas")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    """A model that answers every prompt in capitals."""
    import mlflow
    import pandas as pd

    class Shout(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def predict(self, context, model_input, params=None):  # MLflow reads type hints as a schema
            return [prompt.upper() for prompt in model_input["prompt"]]

    folder = tmp_path_factory.mktemp("made") / "model"
    signature = mlflow.models.infer_signature(pd.DataFrame({"prompt": ["hello"]}), ["HELLO"])
    mlflow.pyfunc.save_model(
        folder, python_model=Shout(), pip_requirements=["mlflow"], signature=signature
    )
    return folder


@pytest.fixture
def make(store: Store, model: Path) -> Make:
    def run(gate: str | None = "passed", status: str = "FINISHED", files: bool = True) -> str:
        tags = {"train_key": "abc"} | ({"gate": gate} if gate else {})
        made = store.client.create_run(store.experiment_id, tags=tags)
        store.client.log_param(made.id, "model.preset", "embedded")
        if files:
            store.client.log_artifacts(made.id, str(model), "model")
        if status != "RUNNING":
            store.client.set_terminated(made.id, status)
        return str(made.id)

    return run


def registered(store: Store, run: str, name: str, alias: str = "champion", **options: Any) -> Any:
    return register(store.root, run, name, alias, options.get("force", False))


def versions(store: Store, name: str) -> list[Any]:
    return list(store.client.search_model_versions(f"name='{name}'"))


def test_the_champion_is_loaded_by_its_name(store: Store, make: Make) -> None:
    import mlflow
    import pandas as pd

    run = make()
    done = register(store.root, run, None, "champion", force=False)
    assert done[:5] == ("capas-embedded", "1", "champion", True, None)
    mlflow.set_tracking_uri(tracking_uri(store.root))
    loaded = mlflow.pyfunc.load_model("models:/capas-embedded@champion")
    assert loaded.predict(pd.DataFrame({"prompt": ["hola"]})) == ["HOLA"]
    (version,) = versions(store, "capas-embedded")
    assert version.run_id == run
    assert version.tags == {"train_key": "abc", "gate": "passed"}


def test_the_same_run_twice_changes_nothing(store: Store, make: Make) -> None:
    run = make()
    registered(store, run, "twice")
    before = dict(versions(store, "twice")[0])
    assert registered(store, run, "twice")[:5] == ("twice", "1", "champion", False, None)
    assert [dict(version) for version in versions(store, "twice")] == [before]


def test_the_alias_moves_to_the_next_run_and_back(store: Store, make: Make) -> None:
    first, second = make(), make()
    registered(store, first, "moves")
    assert registered(store, second, "moves")[:5] == ("moves", "2", "champion", True, "1")
    assert registered(store, first, "moves", "challenger").moved_from is None
    aliases = store.client.get_registered_model("moves").aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {
        **{"champion": 2, "challenger": 1}
    }
    assert registered(store, first, "moves").moved_from == "2"
    assert len(versions(store, "moves")) == 2


@pytest.mark.parametrize(
    ("gate", "reason"), [(FAILED, f"gate {FAILED}"), (None, "the run has no tag 'gate'")]
)
def test_a_failed_gate_needs_force_which_leaves_a_tag(
    store: Store, make: Make, gate: str | None, reason: str
) -> None:
    run, name = make(gate), f"forced-{gate is None}"
    with pytest.raises(RefusedError) as refused:
        registered(store, run, name)
    assert len(refused.value.reasons) == 1 and refused.value.reasons[0].startswith(reason)
    assert not store.client.search_registered_models(f"name='{name}'")
    registered(store, run, name, force=True)
    (version,) = versions(store, name)
    assert version.tags["forced"].startswith(reason)


def test_force_leaves_no_tag_where_it_was_not_needed(store: Store, make: Make) -> None:
    registered(store, make(), "needless", force=True)
    assert "forced" not in versions(store, "needless")[0].tags


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_force_registers_no_unfinished_run(store: Store, make: Make, status: str) -> None:
    with pytest.raises(RefusedError, match=f"the run is {status}"):
        registered(store, make(status=status), "unfinished", force=True)
    assert not store.client.search_registered_models("name='unfinished'")


def test_all_reasons_are_told_at_once(store: Store, make: Make) -> None:
    with pytest.raises(RefusedError) as refused:
        registered(store, make(FAILED, "FAILED", files=False), "nothing")
    assert [reason.split(":")[0] for reason in refused.value.reasons] == [
        "the run is FAILED",
        "the run has no model (artifact model/MLmodel)",
        "gate failed",
    ]


def test_a_run_is_found_by_the_beginning_of_its_id_and_by_its_name(
    store: Store, make: Make
) -> None:
    run = make()
    store.client.set_tag(run, "mlflow.runName", "my-own-run")
    for wanted in (run[:12], "my-own-run"):
        registered(store, wanted, "found")
    assert [version.run_id for version in versions(store, "found")] == [run]


def test_a_run_must_be_the_only_one(store: Store, make: Make) -> None:
    twins = [make(), make()]
    for run in twins:
        store.client.set_tag(run, "mlflow.runName", "twin")
    with pytest.raises(CapasError, match="'twin' matches 2 runs") as caught:
        registered(store, "twin", "twins")
    assert all(run in str(caught.value) for run in twins)
    with pytest.raises(CapasError, match="no training run 'nobody'"):
        registered(store, "nobody", "twins")


@pytest.mark.parametrize("alias", ["latest", "v1", "V2", "two words", ""])
def test_an_alias_that_mlflow_does_not_take_leaves_nothing(
    store: Store, make: Make, alias: str
) -> None:
    with pytest.raises(CapasError, match="--alias"):
        registered(store, make(files=False), "odd-alias", alias)
    assert not store.client.search_registered_models("name='odd-alias'")


@pytest.mark.parametrize("name", ["a/b", "a:b", "it's", " "])
def test_a_name_that_mlflow_does_not_take_is_told(store: Store, make: Make, name: str) -> None:
    with pytest.raises(CapasError, match="--name"):
        registered(store, make(files=False), name)


def test_the_command_tells_what_it_did(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(store.root)
    good, bad = make(), make(FAILED)
    assert cli.main(["register", good, "--name", "told"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "told version 1 registered; alias champion",
        'mlflow.pyfunc.load_model("models:/told@champion")',
        f"its run: http://127.0.0.1:5000/#/experiments/{store.experiment_id}/runs/{good}"
        "?workflowType=machine_learning   (served by `make ui`)",
    ]
    assert cli.main(["register", bad, "--name", "told", "--alias", "next"]) == 1
    assert f"{bad} is not registered:\n  gate {FAILED}" in capsys.readouterr().err
    assert cli.main(["register", bad, "--name", "told", "--force"]) == 0
    assert "version 2 registered; alias champion, which was version 1" in capsys.readouterr().out


def test_the_command_says_where_it_must_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # of mlflow.set_tracking_uri above
    monkeypatch.chdir(tmp_path)
    assert cli.main(["register", "abc"]) == 2
    assert "no run was published in this workspace" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_error_that_nobody_expected_is_no_answer(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cli.COMMANDS[name], "command", broken)
    words = {"chat": [], "lab": ["template"], "restore": [], "ui": []}
    assert cli.main([name, *words.get(name, ["abc"])]) == 2
    said = capsys.readouterr().err
    assert "in broken" in said
    assert said.endswith("capas: unexpected: OSError: [Errno 5] Input/output error\n")


def test_a_full_disk_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "merged/model.safetensors")

    monkeypatch.setattr(cli.COMMANDS["merge"], "command", full)
    assert cli.main(["merge", "merged"]) == 2
    said = capsys.readouterr().err
    assert said == "capas: No space left on device (merged/model.safetensors)\n"
