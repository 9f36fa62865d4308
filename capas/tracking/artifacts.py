"""Check, before a training, where a run's artifacts go and whether they can be written from here."""

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from capas.core.errors import CapasError, without_secrets

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PACKAGES = {  # scheme -> packages that MLflow needs for it but does not install
    **dict.fromkeys(("s3", "r2", "b2"), "boto3"),
    "gs": "google-cloud-storage",
    "wasbs": "azure-storage-blob azure-identity",
    "abfss": "azure-storage-file-datalake azure-identity",
    "sftp": "pysftp",
}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`; "
    "MLFLOW_S3_ENDPOINT_URL names an S3 server other than Amazon's",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "wasbs": "set AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCESS_KEY",
    "abfss": "set AZURE_STORAGE_CONNECTION_STRING, or run `az login`",
}
_OTHERWISE = (
    "start the server with `mlflow server --artifacts-destination WHERE`, so the server stores them"
)


class UnusableStoreError(CapasError):
    """The configured MLflow store cannot work here; waiting and retrying do not help."""


def check_artifacts(location: str, uri: str, list_artifacts: Callable[[str, str], None]) -> None:
    """Check that the artifact store of an experiment can be used.

    Args:
        location: `artifact_location` of the experiment, e.g. s3://bucket/1.
        uri: the tracking server or database.
        list_artifacts: lists a store with its client library, and raises what that raises.

    Raises:
        UnusableStoreError: its package or credentials are missing, or it is on the server's own disk.
        CapasError: it cannot be reached.
    """
    scheme = urlsplit(location).scheme
    if scheme in ("", "file"):
        return _check_disk(location, uri)
    try:
        list_artifacts(location, uri)
    except Exception as error:  # noqa: BLE001  client libraries raise errors of any class
        raise refusal(error, location) from None


def refusal(error: Exception, location: str) -> CapasError:
    """Return an artifact store's error as a sentence that says how to fix it."""
    scheme = urlsplit(location).scheme
    where = f"the artifacts of MLflow's runs go to {without_secrets(location)}"
    if isinstance(error, ModuleNotFoundError):
        package = _PACKAGES.get(scheme, error.name or "its package")
        return UnusableStoreError(
            f"{where}, for which {error.name} is missing: pip install {package}; or {_OTHERWISE}"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if _is_away(error):
        return CapasError(f"{where}, which does not answer: {without_secrets(reason)}")
    way = f"{_CREDENTIALS[scheme]}; or " if scheme in _CREDENTIALS else ""
    return UnusableStoreError(
        f"{where}, which refuses: {type(error).__name__}: {without_secrets(reason)}. To write there: "
        f"{way}{_OTHERWISE}"
    )


def _is_away(error: Exception) -> bool:
    words = ("Connect", "Timeout", "Transport", "ServerError", "ProxyError")
    return isinstance(error, ConnectionError | TimeoutError) or any(
        word in kind.__name__ for kind in type(error).__mro__ for word in words
    )


def _check_disk(location: str, uri: str) -> None:
    """Check that a folder for artifacts can be written.

    A path from a server on another machine is on that machine's disk, unless it is mounted here too.

    Raises:
        UnusableStoreError: it cannot be written here.
    """
    path = Path(unquote(urlsplit(location).path) if location.startswith("file:") else location)
    server = urlsplit(uri)
    remote = server.scheme in ("http", "https") and server.hostname not in _LOOPBACK
    if remote and not path.is_dir():
        raise UnusableStoreError(
            f"the MLflow server at {without_secrets(uri)} keeps artifacts on its own disk ({path}), where "
            f"this machine cannot write: {_OTHERWISE}; or mount that folder here under the same path"
        )
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UnusableStoreError(
            f"the artifacts of MLflow's runs go to {path}, which cannot be written: {there} belongs "
            f"to another user or is not a folder. Change its owner, or {_OTHERWISE}"
        )
