"""Lose the end token: in the generation, and in the loss of a training."""

import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from capas.chat.tokenizer import TokenizerFiles
from capas.core.errors import CapasError
from capas.core.files import read_json, write_json
from capas.core.language import Language
from capas.core.records import FORMATTED, IGNORE_INDEX, SPLITS, Record, read_records, write_records
from capas.evaluation.formats import Answers
from capas.use.lab.questions import Questions, questions, shorten
from capas.workspace.clone import environment

FOLDER = Path(".dvc/tmp/lab/end-token")
DATA, TRAINED = "data/formatted", ".dvc/tmp/debug/train/data/models/adapter"
STEPS = 100
ASKED, IGNORED, IN_LOSS, NOT_IN_LOSS = "asked", "ignored", "in_loss", "not_in_loss"


def run(root: Path, count: int, language: Language) -> Iterator[str]:
    """Yield a row for each way in which an end token is kept or lost, and what it shows."""
    with questions(root, count) as test:
        known = read_json(root / DATA / "chat.json")
        unknown, unknown_id = unused_token(root, known)
        without = {"stop_token_ids": [unknown_id]}
        yield language.say(
            "end_token.plan", steps=STEPS, known=known["end_token"], unknown=unknown
        ).unescape()
        adapters = {
            IN_LOSS: train(root, unknown_id, in_loss=True),
            NOT_IN_LOSS: train(root, unknown_id, in_loss=False),
        }
        found = {ASKED: answers_of(test), IGNORED: answers_of(test, chat=without)}
        for case, adapter in adapters.items():
            found[case] = answers_of(test, adapter=adapter, chat=without)
    yield ""
    yield str(language.say("end_token.head", metric=test.metric))
    names = {case: language.say(f"end_token.{case}").unescape() for case in found}
    width = max(map(len, names.values()))
    numbers = language.numbers
    for case, answers in found.items():
        ended, score = numbers.pct(answers.stop_rate), numbers.pct(answers.score)
        yield f"{names[case]:<{width}} {ended:>10} {score:>12}"
    yield ""
    for case, answers in found.items():
        yield f"{names[case]:<{width}} {shorten(answers.completions[0])}"
    yield ""
    shares = {case: answers.stop_rate for case, answers in found.items()}
    yield language.say("end_token.finding", known=known["end_token"], **shares).unescape()


def answers_of(
    test: Questions, adapter: Path | None = None, chat: dict[str, list[int]] | None = None
) -> Answers:
    with test.served(adapter=adapter, chat=chat) as served:
        return test.ask(served)


def unused_token(root: Path, chat: dict[str, object]) -> tuple[str, int]:
    """Return a control token that is in no record, and its id; the base has a row for it but no use.

    Raises:
        CapasError: the tokenizer has none.
    """
    files = TokenizerFiles(root / "data/models/tokenizer")
    train = read_records(root / DATA / "train.parquet", FORMATTED)
    used = {number for record in train for number in record["input_ids"]}
    named = set(files.named.values())
    stops = chat["stop_token_ids"]
    assert isinstance(stops, list)
    for number, token in sorted(files.added.items()):
        if token.special and token.content not in named and number not in {*used, *stops}:
            return token.content, number
    raise CapasError(
        "data/models/tokenizer: every control token is in the data already, so this lab has none to end "
        "answers with; it is made for the embedded model (conf/config.yaml: model: embedded)"
    )


def train(root: Path, end_token_id: int, in_loss: bool) -> Path:
    """Train on the records of the result with another end token; return the adapter.

    Raises:
        CapasError: the training failed; it has printed the reason.
    """
    work = (root / FOLDER / ("in-loss" if in_loss else "not-in-loss")).resolve()
    if work.exists():
        shutil.rmtree(work)
    lay_out(root.resolve(), work)
    chat = read_json(root / DATA / "chat.json")
    for split in SPLITS:
        records = read_records(root / DATA / f"{split}.parquet", FORMATTED)
        changed = (
            with_end_token(r, chat["stop_token_ids"], end_token_id, in_loss) for r in records
        )
        write_records(work / DATA / f"{split}.parquet", FORMATTED, changed)
    for file in (root / DATA).iterdir():
        if file.suffix != ".parquet":
            shutil.copyfile(file, work / DATA / file.name)
    ends = {"end_token_id": end_token_id, "stop_token_ids": [end_token_id]}
    write_json(work / DATA / "chat.json", {**chat, **ends})
    steps = [f"trainer.{key}={STEPS}" for key in ("max_steps", "eval_steps", "save_steps")]
    command = [sys.executable, "stages/train_lora.py", *steps]
    done = subprocess.run(command, cwd=work, env=environment(work), check=False)
    if done.returncode:
        raise CapasError(f"the training in {work.relative_to(root.resolve())} failed, see above")
    return work / TRAINED


def lay_out(root: Path, work: Path) -> None:
    """Link everything that the stage `train` reads, except data/formatted, which differs here."""
    (work / DATA).mkdir(parents=True)
    (work / ".dvc/tmp").mkdir(parents=True)
    for folder, apart in ((root, ("data", "reports")), (root / "data", ("formatted",))):
        for entry in folder.iterdir():
            if entry.name not in apart and not entry.name.startswith("."):
                (work / folder.relative_to(root) / entry.name).symlink_to(entry)


def with_end_token(
    record: Record, stops: Collection[int], end_token_id: int, in_loss: bool
) -> Record:
    """Return a record whose last answer ends with another token; no other end token is in the loss."""
    input_ids, labels = list(record["input_ids"]), list(record["labels"])
    ends = [i for i, label in enumerate(labels) if label in stops]
    for i in ends:
        labels[i] = IGNORE_INDEX
    for last in ends[-1:]:
        input_ids[last] = end_token_id
        labels[last] = end_token_id if in_loss else IGNORE_INDEX
    return {**record, "input_ids": input_ids, "labels": labels}
