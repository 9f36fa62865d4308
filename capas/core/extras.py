"""Check the versions of packages that a training uses from an optional extra.

requirements.lock, and so environment.yaml, has only the packages of every installation. The versions of the
extras' packages are here instead: changing one changes a dependency of `train`, which then runs again. triton
is not listed, because torch itself requires the exact version that it was built with.
"""

from importlib.metadata import PackageNotFoundError, version

from capas.core.errors import CapasError

VERSIONS = {
    "gpu": {"liger-kernel": "0.8.5"},
    "unsloth": {"unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "xformers": "0.0.35"},
}


def require(extra: str, key: str) -> None:
    """Check that the extra's packages are installed in their versions; `key` is the setting that needs them.

    Raises:
        CapasError: a package is missing or has another version.
    """
    for package, wanted in VERSIONS[extra].items():
        try:
            found = f"{package} {version(package)} is installed"
        except PackageNotFoundError:
            found = f"{package} is not installed"
        if not found.startswith(f"{package} {wanted} "):
            raise CapasError(
                f"{key} needs {package} {wanted}, and {found}: pip install -e '.[{extra}]'"
            )
