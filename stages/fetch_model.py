"""Get the base model's weights, and the adapter that the training starts from, if it starts from one.

Reads   data/embedded for the embedded model; otherwise a local folder or a revision on the Hub
Writes  data/models/base: config.json, generation_config.json, model*.safetensors
        data/models/initial_adapter: origin.json; adapter_config.json, adapter_model.safetensors
Params  lora.adapter_name_or_path, lora.adapter_revision,
        model.model_name_or_path, model.revision, model.trust_remote_code

The tokenizer is fetched separately (fetch_tokenizer), because looking at a mask needs no weights.
"""

from collections.abc import Callable
from pathlib import Path

from capas.core.errors import CapasError
from capas.core.files import read_json, write_json
from capas.core.links import place
from capas.core.params import Params
from capas.core.stage import Stage, log, run
from capas.hub.embedded import FOLDER, MANIFEST, verify
from capas.hub.sources import (
    ADAPTER,
    ADAPTER_FILES,
    CODE_FILES,
    MODEL_FILES,
    Source,
    check_folder,
    file_names,
    find_source,
    matching,
    snapshot,
)
from capas.models import adapter
from capas.models.architecture import check_supported, stored_quantization

EMBEDDED_FILES = ["config.json", "generation_config.json", "model.safetensors"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def main(params: Params, stage: Stage) -> None:
    fetch_adapter(params.lora, stage)
    name, revision = params.model.model_name_or_path, params.model.revision
    patterns = (*MODEL_FILES, *(CODE_FILES if params.model.trust_remote_code else ()))
    source = find_source(name, stage.root)
    if source is Source.EMBEDDED:
        found = [stage.dep(f"{FOLDER}/{file}") for file in EMBEDDED_FILES]
        verify(stage.dep(MANIFEST), found)
    elif source is Source.FOLDER:
        found = matching(stage.root / name, patterns)
        refuse_pickles(name, found, lambda: [file.name for file in (stage.root / name).iterdir()])
    else:
        check_config(
            snapshot(name, revision, ("config.json",)), name
        )  # before downloading gigabytes
        found = matching(snapshot(name, revision, patterns), patterns)
        refuse_pickles(name, found, lambda: file_names(name, revision))
    check_files(found, name)
    if source is Source.FOLDER:
        check_folder(stage.root / name, name, revision, "model")

    folder = stage.out("data/models/base")
    folder.mkdir()
    immutable = (
        source is Source.HUB
    )  # its cache is addressed by content, so its files are never edited
    ways = {place(file, folder / file.name, immutable) for file in found}
    log.info("%s: %d files (%s)", name, len(found), ", ".join(sorted(ways)))


def fetch_adapter(lora: Params, stage: Stage) -> None:
    """Get the adapter, or write a note that there is none.

    Raises:
        CapasError: it is not a LoRA adapter in PEFT's format, or a training cannot start from it.
    """
    folder, name = stage.out(adapter.FOLDER), lora.adapter_name_or_path
    folder.mkdir()
    write_json(folder / adapter.ORIGIN, lora.without())
    if name is None:
        return
    is_folder = find_source(name, stage.root, ADAPTER) is Source.FOLDER

    def get(*patterns: str) -> Path:
        there = stage.root / name
        return there if is_folder else snapshot(name, lora.adapter_revision, patterns, ADAPTER)

    check_adapter(get(adapter.CONFIG), name)  # before downloading the weights
    found = get(*ADAPTER_FILES)
    if not (found / adapter.WEIGHTS).is_file():
        raise CapasError(
            f"{name} has no {adapter.WEIGHTS}. Loading an adapter_model.bin can run arbitrary code. "
            "If you trust the adapter, convert it once: load it with PEFT and save it again "
            "(save_pretrained)"
        )
    for file in matching(found, ADAPTER_FILES):
        place(file, folder / file.name, immutable=not is_folder)
    if is_folder:
        check_folder(found, name, lora.adapter_revision, "adapter")
    log.info("training starts from the adapter %s", name)


def check_adapter(folder: Path, name: str) -> None:
    """Check that a folder has an adapter that a training can start from.

    Raises:
        CapasError: there is no adapter_config.json, or see `adapter.check_kind`.
    """
    if not (folder / adapter.CONFIG).is_file():
        raise CapasError(
            f"lora.adapter_name_or_path={name} has no {adapter.CONFIG}, so it is not an adapter in "
            "PEFT's format. For a whole model, set model.model_name_or_path"
        )
    adapter.check_kind(read_json(folder / adapter.CONFIG), name)


def refuse_pickles(name: str, found: list[Path], all_names: Callable[[], list[str]]) -> None:
    """Check that weights were found as safetensors.

    Args:
        all_names: returns the names of all files of the model, for the message.

    Raises:
        CapasError: there are no safetensors.
    """
    if any(file.suffix == ".safetensors" for file in found):
        return
    pickles = sorted(other for other in all_names() if Path(other).suffix in PICKLES)
    if not pickles:
        raise CapasError(f"{name} has no model*.safetensors: it is not a model folder")
    raise CapasError(
        f"{name} has its weights only as {', '.join(pickles)}. Loading such a file can run "
        "arbitrary code, so capas reads safetensors only. Choose a revision with safetensors. Or, "
        "if you trust the model, convert it once "
        "(AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)) and set "
        "model.model_name_or_path=FOLDER."
    )


def check_config(folder: Path, name: str) -> None:
    """Check, by its config.json, that capas can train the model.

    Raises:
        CapasError: there is no config.json, the model is not causal, or its quantization cannot be trained.
    """
    if not (folder / "config.json").is_file():
        raise CapasError(f"{name} has no config.json")
    config = read_json(folder / "config.json")
    check_supported(config, name)
    stored_quantization(config, name)


def check_files(found: list[Path], name: str) -> None:
    """Check config.json and that no shard of the weights is missing.

    Raises:
        CapasError: a shard is missing, or see `check_config`.
    """
    files = {file.name: file for file in found}
    check_config(found[0].parent, name)
    if index := files.get("model.safetensors.index.json"):
        shards = set(read_json(index)["weight_map"].values())
        if missing := sorted(shards - set(files)):
            raise CapasError(
                f"{name}: model.safetensors.index.json names missing files: {', '.join(missing)}"
            )


if __name__ == "__main__":
    run("fetch_model", main)
