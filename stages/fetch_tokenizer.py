"""Get the tokenizer alone, so that looking at a mask never needs model weights.

Reads   data/embedded, a local folder, or the Hub at a commit, as model.model_name_or_path says
Writes  data/models/tokenizer: tokenizer.json, tokenizer_config.json and, if the model has them, its
        special_tokens_map.json and chat_template.jinja
Params  model
"""

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from capas.chat.tokenizer import CONFIG, TOKENIZER, TokenizerFiles
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.stage import Stage, log, run
from capas.hub import embedded
from capas.hub.sources import TOKENIZER_FILES, Source, check_folder, find_source, snapshot
from capas.models.vocabulary import in_words, num_rows, tokens_without_row

MODEL_CONFIG = "config.json"


def main(params: Params, stage: Stage) -> None:
    name = params.model.model_name_or_path
    source = find_source(name, stage.root)
    if source is Source.EMBEDDED:
        files = [stage.dep(f"{embedded.FOLDER}/{file}") for file in (TOKENIZER, CONFIG)]
        embedded.verify(stage.dep(embedded.MANIFEST), files)
        folder = files[0].parent
    elif source is Source.FOLDER:
        folder = stage.root / name
    else:
        folder = snapshot(name, params.model.revision, (*TOKENIZER_FILES, MODEL_CONFIG))

    copied = copy_files(folder, stage.out("data/models/tokenizer"))
    if source is Source.FOLDER:
        check_folder(folder, name, params.model.revision, "tokenizer")
    warn_of_tokens_without_row(folder, name)
    log.info("%s: %s", name, ", ".join(copied))


def warn_of_tokens_without_row(folder: Path, name: str) -> None:
    """Log which tokens have no row in the embedding; later stages check whether they are used."""
    rows = num_rows(folder) if (folder / MODEL_CONFIG).is_file() else None
    if rows is None:
        return
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    if beyond := tokens_without_row(tokenizer, rows):
        log.warning(
            "%s: its tokenizer has %s, and its embedding has %d rows (config.json: vocab_size), for the ids "
            "0 to %d; a record or chat template that uses such a token stops the pipeline before training",
            *(name, in_words(beyond, tokenizer), rows, rows - 1),
        )


def copy_files(folder: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files and nothing else, then load them; return their names.

    Raises:
        CapasError: the folder has no fast tokenizer, or a damaged one.
    """
    target.mkdir()
    there = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if TOKENIZER not in there:
        slow = [
            file.name for file in sorted(folder.glob("*.model")) + sorted(folder.glob("vocab.*"))
        ]
        raise CapasError(
            f"{folder} has no {TOKENIZER}"
            + (f" (only {', '.join(slow)}, of a slow tokenizer)" if slow else "")
            + "; convert it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder), "
            "then point model.model_name_or_path to that folder"
        )
    for name in there:
        shutil.copyfile(folder / name, target / name)
    TokenizerFiles(target).build()
    return there


if __name__ == "__main__":
    run("fetch_tokenizer", main)
