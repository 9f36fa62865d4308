"""Load the test questions of the workspace's result, and models that answer them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.core.errors import CapasError
from capas.core.files import read_json, write_json
from capas.core.params import Params
from capas.core.records import FORMATTED, RAW, Record, evenly_spaced, read_records
from capas.evaluation.answer_length import answer_limit
from capas.evaluation.formats import Answers, Format, ask
from capas.evaluation.names import of_answers
from capas.evaluation.prompts import Prompt, held_out_prompts
from capas.evaluation.scorer import Scorer
from capas.use import tuned_model

WIDTH = 120  # characters of an answer that are shown


@dataclass(frozen=True)
class Questions:
    """Records of the test split, in the format that the model was trained in.

    `folder` is a folder that `capas.use.served_model.Served` reads.
    """

    root: Path
    folder: Path
    params: Params
    records: list[Record]
    prompts: list[Prompt]
    scorer: Scorer

    @property
    def metric(self) -> str:
        return self.scorer.names[0]

    def ask(self, served: Any, form: Format | None = None) -> Answers:
        """Return the answers of a `Served`, in the format of its training unless `form` is given."""
        if form is None:
            form = Format([record["prompt_ids"] for record in self.records], [])
        limit = answer_limit(self.records, self.params.evaluation.max_new_tokens)
        size, tokenizer = self.params.evaluation.batch_size, served.format.tokenizer
        return ask(
            served.model, self.records, form, served.chat, self.scorer, tokenizer, limit, size
        )

    @contextmanager
    def served(
        self,
        adapter: Path | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> Iterator[Any]:
        """Yield the tuned model as `capas.use.served_model.Served`, with parts of it replaced.

        Args:
            adapter: the folder of another training.
            chat: keys of chat.json, e.g. other stop tokens.
        """
        from capas.use.served_model import Served

        with TemporaryDirectory(prefix="capas-") as name:
            folder = Path(name)
            (folder / "adapter").symlink_to((adapter or self.folder / "adapter").resolve())
            (folder / "base").symlink_to((self.folder / "base").resolve())
            (folder / "served.json").symlink_to((self.folder / "served.json").resolve())
            write_json(
                folder / "chat.json", {**read_json(self.folder / "chat.json"), **(chat or {})}
            )
            yield Served(folder)


@contextmanager
def questions(root: Path, count: int) -> Iterator[Questions]:
    """Yield at most `count` questions of the result in `root`, while the block lasts.

    Raises:
        CapasError: nothing is trained here, or no metric scores answers.
    """
    with tuned_model.tuned(root, None) as source:
        metrics = of_answers(source.params.evaluation.metrics)
        scorer = Scorer(metrics, root / "data/composed/metrics.json")
        if not scorer.names:
            raise CapasError(
                "evaluation.metrics=[] scores no answer; choose one, e.g. evaluation.metrics=[exact_match], "
                "and run `dvc repro`"
            )
        every = list(read_records(root / "data/formatted/test.parquet", FORMATTED))
        records = evenly_spaced(every, count)
        raw = read_records(root / "data/raw/test.parquet", RAW)
        prompts = held_out_prompts(raw, records, len(records))
        yield Questions(root, source.folder, source.params, records, prompts, scorer)


def shorten(text: str) -> str:
    """Return a text as one line of at most `WIDTH` characters."""
    line = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def last_question(prompt: Prompt) -> str:
    """Return the user's last question."""
    return str(prompt.messages[-1]["content"])
