"""Read data/models/adapter, the result of a training: an adapter, or a whole model (lora=none)."""

import hashlib
from pathlib import Path

from capas.core.files import file_sha256

FOLDER = "data/models/adapter"


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def sha256(folder: Path) -> str:
    """Return the SHA-256 of the weights' file; for several files, that of their listing by sha256sum."""
    files = sorted(folder.glob("*.safetensors"))
    sums = [file_sha256(file) for file in files]
    if len(files) == 1:
        return sums[0]
    lines = [f"{found}  {file.name}\n" for found, file in zip(sums, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
