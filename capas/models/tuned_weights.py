"""data/models/adapter as a training leaves it: an adapter, or a whole model (lora=none)."""

import hashlib
from pathlib import Path

from capas.core.files import file_sha256

FOLDER = "data/models/adapter"


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def sha256(folder: Path) -> str:
    """Of the weights' file; of several the sha256 of their names and sums, as sha256sum writes them."""
    files = sorted(folder.glob("*.safetensors"))
    sums = [file_sha256(file) for file in files]
    if len(files) == 1:
        return sums[0]
    lines = [f"{found}  {file.name}\n" for found, file in zip(sums, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
