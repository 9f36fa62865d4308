"""Make the embedded base: corpus, tokenizer, pretraining. Not a stage of the DAG: `make embedded` runs it.

Reads nothing but code; writes data/embedded/. The files are built in a temporary folder and compared with the
shipped ones by SHA-256; only `--replace` replaces files that differ. A document of the corpus::

    <|im_start|>user
    Wake me up at 7:30 on Monday.<|im_end|>
    <|im_start|>assistant
    Okay, I will wake you at 07:30 on Monday.<|im_end|>
"""

import argparse
import csv
import json
import logging
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from capas.core.errors import CapasError, exit_on_user_error
from capas.core.files import file_sha256, read_json
from capas.core.params import Params
from capas.dataset.task.corpus import generate_corpus
from capas.models import hardware

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from capas.dataset.task.pretraining import Recipe

FOLDER = Path(__file__).resolve().parents[1] / "data" / "embedded"
# Fixed here, not read from conf/: the shipped bytes must not depend on a user's configuration.
HARDWARE = {
    "preset": "cpu",
    "device": "cpu",
    "num_threads": 2,
    "instruction_set": "portable",
    "allow_tf32": False,
    "cudnn_deterministic": True,
    "cudnn_benchmark": False,
}
PACKAGES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
TOKENIZER_DOCUMENTS = 30_000
CURVE_STEPS = 25  # a point of the curve is the mean of this many steps
MANIFEST = "manifest.json"

log = logging.getLogger("capas")


def main(arguments: list[str] | None = None) -> int:
    """Build, compare and replace; return 1 if files differ and `--replace` is not given."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded base model.")
    parser.add_argument(
        "--replace", action="store_true", help="replace files in data/embedded that differ"
    )
    parser.add_argument("--num-threads", type=int, default=HARDWARE["num_threads"])
    options = parser.parse_args(arguments)
    hardware.prepare(Params({**HARDWARE, "num_threads": options.num_threads}))
    from capas.dataset.task.pretraining import Recipe  # imports torch, whose environment is now set

    with tempfile.TemporaryDirectory(prefix="embedded-") as aside:
        build(Path(aside), Recipe())
        different = compare(Path(aside), FOLDER)
        if different and options.replace:
            replace(Path(aside), FOLDER)
            return 0
    if different:
        log.info("data/embedded/ is unchanged; --replace installs the new files")
    return 1 if different else 0


def build(folder: Path, recipe: "Recipe") -> None:
    """Write all files of the embedded base, the manifest last."""
    from capas.dataset.task import pretraining

    started = time.monotonic()
    texts = (document.render() for document in generate_corpus(recipe.seed, TOKENIZER_DOCUMENTS))
    tokenizer = pretraining.train_tokenizer(texts, recipe.vocab_size)
    num_rows = recipe.num_steps * recipe.batch_rows
    corpus = (document.render() for document in generate_corpus(recipe.seed))
    rows = pretraining.pack_rows(tokenizer, corpus, num_rows, recipe.row_tokens)
    log.info("corpus: %d tokens in %d rows", rows.numel(), len(rows))
    model = pretraining.build_model(recipe)
    losses: list[float] = []
    pretraining.pretrain(model, rows, recipe, lambda step, loss: note(step, loss, losses))
    save_tokenizer(tokenizer, folder, recipe.max_position_embeddings)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    write_curve(folder / "curve.csv", losses, recipe.batch_rows * recipe.row_tokens)
    facts = {
        "num_parameters": model.num_parameters(),
        "num_tokens": rows.numel(),
        "loss": round(sum(losses[-CURVE_STEPS:]) / CURVE_STEPS, 6),
        "seconds": round(time.monotonic() - started),
    }
    write_manifest(folder, recipe, facts)


def note(step: int, loss: float, losses: list[float]) -> None:
    """Append the loss of a step, and log a line every 100 steps."""
    losses.append(loss)
    if (step + 1) % 100 == 0:
        log.info("step %d: loss %.3f", step + 1, sum(losses[-100:]) / len(losses[-100:]))


def save_tokenizer(tokenizer: "Tokenizer", folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, with ChatML as the template of the base."""
    from transformers import PreTrainedTokenizerFast

    from capas.dataset.task.pretraining import BOS, CHAT_TEMPLATE, EOS, PAD

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version knows
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def write_curve(path: Path, losses: list[float], tokens_per_step: int) -> None:
    """Write the pretraining loss, one row for every `CURVE_STEPS` steps."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "num_tokens", "loss"])
        for end in range(CURVE_STEPS, len(losses) + 1, CURVE_STEPS):
            mean = sum(losses[end - CURVE_STEPS : end]) / CURVE_STEPS
            writer.writerow([end, end * tokens_per_step, f"{mean:.6f}"])


def write_manifest(folder: Path, recipe: "Recipe", facts: dict[str, object]) -> None:
    """Write what the files are, how they were made, and their SHA-256."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    manifest = {
        "name": "capas embedded base",
        "description": "A tiny Llama language model with a byte-level BPE tokenizer, pretrained on a "
        "generated English and Spanish corpus by stages/pretrain_embedded.py.",
        "licence": "Apache-2.0",
        **facts,
        "recipe": asdict(recipe),
        "hardware": HARDWARE,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def list_files(folder: Path) -> dict[str, str]:
    """Return {name: SHA-256} of the files that a rebuild must repeat (the manifest records seconds)."""
    try:
        names = read_json(folder / MANIFEST)["files"]
    except (CapasError, KeyError) as error:
        log.info("%s tells nothing: %s", folder / MANIFEST, error)
        return {}
    return {name: file_sha256(folder / name) for name in names if (folder / name).exists()}


def compare(built: Path, shipped: Path) -> list[str]:
    """Return the names of the files that differ, and log the state of every file."""
    new, old = list_files(built), list_files(shipped)
    different = [name for name in sorted({*new, *old}) if new.get(name) != old.get(name)]
    for name in sorted({*new, *old}):
        state = "different" if name in different else "equal"
        log.info("%-24s %-10s %s", name, state, new.get(name, "not built"))
    return different


def replace(built: Path, shipped: Path) -> None:
    """Put the built files in place of the shipped ones, the manifest last."""
    shipped.mkdir(parents=True, exist_ok=True)
    new = list_files(built)
    for name in list_files(shipped).keys() - new.keys():
        (shipped / name).unlink()
    for name in [*new, MANIFEST]:
        shutil.copyfile(built / name, shipped / name)
    log.info("replaced the files in %s", shipped.name)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_user_error("pretrain_embedded"):
        sys.exit(main())
