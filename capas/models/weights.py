"""Read the weights in a model's folder from its safetensors, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from capas.core.errors import CapasError, listed

if TYPE_CHECKING:
    import torch


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def num_shards(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


def read_weights(folder: Path, modules: list[str]) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield (module, its weight as stored), shard by shard, so that only one weight is in memory.

    The name of a stored weight may lack the beginning of its module's path: `model.layers.0.mlp.up_proj` may
    be stored as `layers.0.mlp.up_proj.weight`. The longest common ending decides, if only one weight has it.
    A module whose weight is not found this way is left out.
    """
    files = sorted(folder.glob("*.safetensors"))
    stored = {name: file for file in files for name in _names(file)}
    found = {module: name for module in modules if (name := _find(f"{module}.weight", stored))}
    for file in files:
        # a memory-mapped file would stay in memory
        with safe_open(file, "pt", backend="pread") as weights:
            for module, name in found.items():
                if stored[name] == file:
                    yield module, weights.get_tensor(name)


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def _find(wanted: str, stored: dict[str, Any]) -> str | None:
    """Return the only name that shares the longest ending with `wanted`, at least from the layer's number."""
    if wanted in stored:
        return wanted
    parts = wanted.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    for start in range(max(first, 1)):
        ending = ".".join(parts[start:])
        fitting = [name for name in stored if name == ending or name.endswith(f".{ending}")]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def check_finite(what: str, weights: "dict[str, torch.Tensor]") -> None:
    """Check that every weight is a finite number.

    Raises:
        CapasError: one is NaN or infinite.
    """
    broken = sorted(name for name, weight in weights.items() if not weight.isfinite().all())
    if broken:
        raise CapasError(f"{what} has NaN or infinite weights: {listed(broken)}")
