"""Estimate the memory that training needs, before anything is downloaded or run.

    capas memory                                        the configuration in conf/
    capas memory experiment=llama_3.1_8b_qlora_24gb     another configuration, given as Hydra overrides
    capas memory trainer.per_device_train_batch_size=8 quantization=none
    capas memory --tokens 600                           assume that the longest record has 600 tokens

Only the model's config.json is needed: from the last `dvc repro`, a folder, the Hub's cache or the Hub.

Every record of a batch is assumed to have dataset.max_length tokens. `train` estimates again with the real
records, and stops before training if the machine has too little memory.

Exit code: 0 it fits, or this machine has no such device; 1 it does not fit; 2 it cannot be estimated.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capas.config.composition import CONF, Values, composer
from capas.config.pins import Pins
from capas.core.dag import recorded
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.hub.sources import CODE_FILES, Source, find_source, on_hub

BASE = Path("data/models/base")
_IDENTITY = ("model.model_name_or_path", "model.revision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="a Hydra override, as for `dvc exp run -S`"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens of the longest record (default: dataset.max_length)",
    )


def command(options: argparse.Namespace) -> int:
    if options.tokens is not None and options.tokens < 1:
        raise CapasError(f"--tokens {options.tokens}: expected at least 1")
    root, values = composed_here(options.overrides)
    params = Params(values)
    need = of_training(params, config_folder(params.model, root), options.tokens)
    if need.workload.num_processes > 1:
        _say(f"Memory of each of {need.workload.num_processes} processes:")
    _say(table(need.found, need.workload, need.used_bytes, need.free_bytes))
    if not need.fits:
        from capas.training import memory

        _say(
            f"To need less: {'; '.join(memory.ways_out(need.found, need.workload, params.trainer))}"
        )
    return 0 if need.fits else 1


def composed_here(overrides: list[str]) -> tuple[Path, Values]:
    """Return the current folder and the valid values that its conf/ composes to, with known pins.

    Raises:
        CapasError: there is no conf/, or it does not compose to valid values.
    """
    from capas.config.hydra_overrides import check
    from capas.config.problems import refused

    root = Path.cwd()
    if not (root / CONF).is_dir():
        raise CapasError(f"{root} has no conf/; start it in the repository's top folder")
    if problems := check(overrides, root / CONF):
        raise refused(problems, "nothing was done")
    with composer(root / CONF) as compose:
        values = compose(overrides)
    return root, Pins.read(root=root).known(values)


@dataclass(frozen=True)
class Need:
    """The memory that a training needs and the device has; `free_bytes` is None without such a device."""

    found: Any
    workload: Any
    used_bytes: int
    free_bytes: int | None

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or bool(self.found.total <= self.free_bytes)


def of_training(params: Params, folder: Path, tokens: int | None = None) -> Need:
    """Estimate the memory of a training in which every record has `tokens` or dataset.max_length tokens.

    Args:
        folder: the folder with the model's config.json.

    Raises:
        CapasError: see `capas.training.memory.estimate`.
    """
    import torch

    from capas.training import capacity, memory

    number = tokens or params.dataset.max_length
    sizes = params.trainer.per_device_train_batch_size, params.trainer.per_device_eval_batch_size
    row = params.trainer.packing_length or number
    lengths = [row] * sizes[0], [number] * sizes[1]
    workload = memory.Workload.of(params.trainer, params.hardware, *lengths)
    groups = params.model, params.lora, params.trainer
    found = memory.estimate(folder, *groups, workload, params.quantization.without("preset"))

    device = torch.device(params.hardware.device)
    here = workload.on_cpu or torch.cuda.is_available()
    used = capacity.used_bytes(device) if here else 0
    num_sharing = capacity.num_sharing(params.hardware)
    free = capacity.free_bytes(device) // num_sharing if here else None
    return Need(found, workload, used, free)


def config_folder(model: Params, root: Path) -> Path:
    """Return the folder with the model's config.json.

    Raises:
        CapasError: it is not on this machine and cannot be downloaded.
    """
    if _fetched(root) == (model.model_name_or_path, model.revision):
        return root / BASE
    source = find_source(model.model_name_or_path, root)
    if source is not Source.HUB:
        return root / model.model_name_or_path
    files = ("config.json", *(CODE_FILES if model.trust_remote_code else ()))
    try:
        return on_hub(model.model_name_or_path).download(model.revision or "main", files)
    except CapasError as error:
        raise CapasError(
            f"{error}\nThe estimate only needs config.json. Without a network: put this file into a "
            "folder and add model.model_name_or_path=FOLDER model.revision=null"
        ) from None


def _fetched(root: Path) -> tuple[Any, ...] | None:
    """Return name and revision of the model in data/models/base, or None if there is none."""
    entry = recorded(root).get("fetch_model")
    if entry is None or not (root / BASE / "config.json").exists():
        return None
    return tuple(entry["params"]["params.yaml"].get(key) for key in _IDENTITY)


def table(found: Any, workload: Any, used_bytes: int, free_bytes: int | None) -> str:
    """Return the parts of the memory, a line each, their sum, and the memory of the device, if any."""
    from capas.training.memory import show

    batch = getattr(workload, found.phase.replace(" ", "_"))
    note = f"  of the {found.phase}: {batch.num_records} records of {batch.num_tokens} tokens"
    parts = {**found.parts, "Python and libraries": used_bytes}
    lines = [
        f"{name.replace('_', ' '):20}  {show(n):>11}{note if name == 'activations' else ''}"
        for name, n in parts.items()
        if n
    ]
    total = found.total + used_bytes
    end = f"{'total':20}  {show(total):>11}"
    there = (
        "this machine has no GPU to compare with; a GPU also needs memory for the CUDA context "
        "and fragmentation"
        if free_bytes is None
        else f"{show(used_bytes + free_bytes)} available"
    )
    return "\n".join([*lines, "-" * len(end), f"{end}  {there}"])


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
