"""Packages of an extra that a training computes with.

requirements.lock, and with it environment.yaml, has only what every installation has. Their versions stand
here instead: whoever changes one changes a dependency of `train`, which then runs again. triton has no place
here: torch needs the very version that it was built with.
"""

from importlib.metadata import PackageNotFoundError, version

from capas.core.errors import CapasError

VERSIONS = {
    "gpu": {"liger-kernel": "0.8.5"},
    "unsloth": {"unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "xformers": "0.0.35"},
}


def require(extra: str, key: str) -> None:
    """Raises CapasError: a package of the extra, which `key` asks for, is missing or of another version."""
    for package, wanted in VERSIONS[extra].items():
        try:
            found = f"{package} {version(package)} is installed"
        except PackageNotFoundError:
            found = f"{package} is not installed"
        if not found.startswith(f"{package} {wanted} "):
            raise CapasError(
                f"{key} needs {package} {wanted}, and {found}: pip install -e '.[{extra}]'"
            )
