"""Compose environment.yaml: the locked versions of the packages that decide a stage's bytes."""

import re
from pathlib import Path

from capas.core.errors import CapasError

ENVIRONMENT, LOCK = Path("environment.yaml"), Path("requirements.lock")
# The packages whose versions decide a stage's bytes; stages declare those that they use.
PACKAGES = (
    "accelerate", "bitsandbytes", "datasets", "datasketch", "jinja2", "matplotlib", "numpy", "peft",
    "pyarrow", "rouge-score", "sacrebleu", "safetensors", "scikit-learn", "tokenizers", "torch",
    "transformers",
)  # fmt: skip


def environment() -> str:
    """Return environment.yaml as text: the locked version of each package that decides bytes.

    Raises:
        CapasError: requirements.lock does not pin a package.
    """
    lines = [f'{package}: "{version}"' for package, version in locked_versions().items()]
    return "\n".join([f"# From {LOCK}, by stages/compose_params.py.", *lines]) + "\n"


def locked_versions() -> dict[str, str]:
    """Return the locked version of each package in PACKAGES.

    Raises:
        CapasError: requirements.lock does not pin a package.
    """
    pins = dict(
        re.findall(r"^([\w.-]+)==([^\s;+]+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    )
    versions = {name.lower().replace("_", "-"): pin for name, pin in pins.items()}
    missing = [package for package in PACKAGES if package not in versions]
    if missing:
        raise CapasError(f"{LOCK} does not pin {', '.join(missing)}. Update it: make lock")
    return {package: versions[package] for package in PACKAGES}
