"""Whether a run's artifacts can be written is known before the training, and told in a sentence."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capas.core.errors import CapasError
from capas.tracking.artifacts import UnusableStoreError, check_artifacts, refusal
from capas.tracking.client import Client, list_artifacts
from capas.training import live_rows

SERVER = "http://ana:hidden@mlflow.example.com:5000"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("s3://bucket/1", "NoCredentialsError: .*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("gs://bucket/1", "pip install google-cloud-storage; or start the server with"),
        ("wasbs://c@a.blob.core.windows.net/1", "pip install azure-storage-blob"),
        ("/srv/mlflow/artifacts/1", "keeps artifacts on its own disk .*--artifacts-destination"),
        ("file:///srv/ml%20flow/1", r"own disk \(/srv/ml flow/1\)"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_with_what_to_do(
    location: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("google.cloud", "azure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnusableStoreError, match=reason) as told:
        check_artifacts(location, SERVER, list_artifacts)
    assert "hidden" not in str(told.value)


def test_a_disk_that_is_here_too_will_do(tmp_path: Path) -> None:
    check_artifacts(tmp_path.as_uri(), SERVER, list_artifacts)  # mounted under the same path
    check_artifacts(f"{tmp_path}/later/1", "http://localhost:5000", list_artifacts)
    check_artifacts((tmp_path / "later").as_uri(), f"sqlite:///{tmp_path}/x.db", list_artifacts)
    (tmp_path / "file").touch()
    with pytest.raises(UnusableStoreError, match=r"cannot be written: .*/file belongs to"):
        check_artifacts(f"{tmp_path}/file/1", "http://localhost:5000", list_artifacts)


def test_a_store_that_is_away_may_come_back() -> None:
    error = refusal(ConnectionResetError("peer"), "s3://bucket/1")
    assert not isinstance(error, UnusableStoreError)
    assert "does not answer: peer" in str(error)


def test_whatever_an_artifact_store_raises_becomes_a_sentence() -> None:
    class Mlflow:
        def get_run(self, run_id: str) -> Any:
            return SimpleNamespace(info=SimpleNamespace(artifact_uri=f"s3://bucket/{run_id}"))

        def log_artifact(self, run_id: str, file: str) -> None:
            raise KeyError("whatever")

        def set_tag(self) -> None:
            raise KeyError("a defect of its own")

    client = Client(Mlflow())
    with pytest.raises(
        CapasError, match="go to s3://bucket/one, which refuses: KeyError: 'whatever'"
    ):
        client.log_artifact("one", "file")
    with pytest.raises(KeyError, match="a defect"):
        client.set_tag()


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text("tracking: {enabled: true, experiment_name: x}\n")
    monkeypatch.setenv("CAPAS_HOME", str(tmp_path))
    return tmp_path


def test_a_training_whose_result_could_not_be_published_is_refused(
    tracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+nodriver://ana:hidden@127.0.0.1:9/runs")
    with pytest.raises(CapasError, match=r"(?s)could not be published: .*tracking=none") as told:
        live_rows.start_check(tracked, enabled=True)()
    assert "hidden" not in str(told.value)
    live_rows.start_check(tracked, enabled=False)()


def test_a_server_that_is_away_does_not_stop_a_training(
    tracked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://ana:hidden@127.0.0.1:9/runs")
    live_rows.start_check(tracked, enabled=True)()
    assert "training continues without MLflow: no database answers at" in caplog.text
    assert "hidden" not in caplog.text
