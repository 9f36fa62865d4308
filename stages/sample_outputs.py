"""Let base and tuned model answer the same prompts over a grid of decoding settings.

Reads   data/composed, data/formatted, data/models/adapter, data/models/quantized, data/models/tokenizer,
        data/raw (test)
Writes  reports/samples.jsonl, reports/samples.md, reports/samples.json, reports/next_token.csv,
        reports/answer_loss.csv, reports/attention.json
Params  evaluation.metrics, generation, hardware, model

The travelling record at its end, in samples.jsonl:

    {"prompt_id": ..., "setting": "greedy", "model": "base", "completions": ["Okay, 99 minutes from now."]}
    {"prompt_id": ..., "setting": "greedy", "model": "tuned", "completions": ["{\\"name\\": ...}"]}
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from capas.chat.messages import TEXT
from capas.chat.recorded import recorded_format
from capas.chat.template import Template, TemplateRefusal, place_system
from capas.chat.tokenizer import TokenizerFiles
from capas.core.errors import CapasError
from capas.core.files import read_json, write_csv, write_json
from capas.core.params import Params
from capas.core.progress import doing
from capas.core.records import FORMATTED, IGNORE_INDEX, RAW, read_records
from capas.core.stage import Stage, log, run
from capas.evaluation.prompts import (
    Prompt,
    answer_limit,
    first_system_message,
    held_out_prompts,
    own_prompts,
)
from capas.evaluation.scorer import Scorer
from capas.models import hardware
from capas.models.vocabulary import check_ids

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
COMPOSED, DATA, TOKENIZER = "data/composed", "data/formatted", "data/models/tokenizer"
MODELS = ("base", "tuned")
COLUMNS = ("setting", "model", "token", "probability")  # of reports/next_token.csv
LOSS_COLUMNS = ("record_id", "token", *MODELS)  # of reports/answer_loss.csv
NUM_TOKENS = 8  # of a next-token distribution


def main(params: Params, stage: Stage) -> None:
    device = hardware.prepare(params.hardware)  # before torch is imported
    stage.costs |= hardware.machine()
    from capas.models.loading import TunedModel, load_model

    right = recorded_format(stage.dep(DATA), stage.dep(TOKENIZER))
    prompts = choose_prompts(params.generation, stage)
    quantized = stage.dep("data/models/quantized")
    prompt_ids = [right.prompt_ids(prompt.messages, prompt.tools) for prompt in prompts]
    check_ids(prompt_ids, (read_chat(stage)["pad_token_id"],), quantized, stage.dep(TOKENIZER))
    load_base = partial(load_model, quantized, params.model, device)
    tuned = TunedModel(stage.dep("data/models/adapter"), params.model, device, load_base)
    limit = answer_limit(test_records(stage), params.generation.max_new_tokens)
    models = Models(tuned, read_chat(stage), load_tokenizer(stage), params.generation, limit)

    settings, rows = list(params.generation.settings), []
    with doing("prompts and settings", len(prompts) * len(settings) * len(MODELS)) as asked:
        asking = zip(prompts, prompt_ids, strict=True)
        for (prompt, ids), setting, which in itertools.product(asking, settings, MODELS):
            rows.append(models.ask(which, prompt, ids, setting))
            asked.step()
    wrong_rows = list(ask_wrongly(models, prompts, params, stage))
    place, probabilities = models.look_inside(prompts[0], prompt_ids[0])
    losses = models.losses(record) if (record := record_of(prompts[0], stage)) else []

    write_lines(rows + wrong_rows, stage)
    scorer = Scorer(params.evaluation.metrics, stage.dep(f"{COMPOSED}/metrics.json"))
    questions = {p.prompt_id: p.messages[-1]["content"] for p in prompts}
    facts = summarize(rows, wrong_rows, place, params.generation, scorer, questions)
    write_json(stage.out("reports/samples.json"), facts)
    write_csv(stage.out("reports/next_token.csv"), COLUMNS, probabilities)
    write_csv(stage.out("reports/answer_loss.csv"), LOSS_COLUMNS, losses)
    stage.out("reports/samples.md").write_text(
        to_markdown(prompts, rows + wrong_rows), encoding="utf-8"
    )
    compare_attention(tuned.model, prompt_ids, stage)
    log.info("%d prompts, %d settings", len(prompts), len(params.generation.settings))


@dataclass(frozen=True)
class Models:
    """The tuned model with its base, and how they are asked."""

    tuned: Any
    chat: dict[str, Any]
    tokenizer: Tokenizer
    generation: Params
    max_new_tokens: int

    def ask(self, which: str, prompt: Prompt, ids: list[int], setting: str) -> Row:
        """Completions under one setting. The seed is the prompt's own: no other prompt moves them."""
        import torch

        settings = self.generation.settings[setting].without()
        count = self.generation.num_return_sequences if settings["do_sample"] else 1
        torch.manual_seed(seed_of(self.generation.seed, prompt, setting))
        found = self._complete(which, ids, **settings, num_return_sequences=count)
        texts = [self._decode(completion) for completion in found]
        return {
            "prompt_id": prompt.prompt_id,
            "messages": prompt.messages,
            "reference": prompt.reference,
            "setting": setting,
            "model": which,
            "template": "right",
            "completions": texts,
            "num_distinct": len(set(texts)),
        }

    def look_inside(self, prompt: Prompt, ids: list[int]) -> tuple[Row, list[Row]]:
        """The place in the tuned model's greedy answer where it wavers most, and what it may write there.

        Returns:
            The place (reports/samples.json), and the rows of reports/next_token.csv: the most probable tokens
            of each model, with their probabilities before and after every setting that samples.
        """
        answer = self._complete("tuned", ids)[0]
        own = self._logits("tuned", ids, answer).log_softmax(dim=-1)
        position = int((-(own.exp() * own).sum(dim=-1)).argmax())  # entropy
        rows = [
            {"model": which} | row
            for which in MODELS
            for row in self._probabilities(
                self._logits(which, ids, answer)[position], ids + answer[:position]
            )
        ]
        place = {
            "prompt_id": prompt.prompt_id,
            "position": position,
            "text_before": self._decode(answer[:position]),
            "tokens": [row["token"] for row in rows[-NUM_TOKENS:]],
        }
        return place, rows

    def losses(self, record: Row) -> list[Row]:
        """Return the loss of each token of a record's last trained answer under both models, in nats.

        Args:
            record: of data/formatted.
        """
        import torch

        start, end = last_trained(record["labels"])
        before, answer = record["input_ids"][:start], record["input_ids"][start:end]
        found = {}
        for which in MODELS:
            probabilities = self._logits(which, before, answer)[:-1].log_softmax(dim=-1)
            picked = probabilities.gather(1, torch.tensor(answer)[:, None])
            found[which] = (-picked[:, 0]).tolist()
        return [
            {"record_id": record["id"], "token": self._decode([token])}
            | {which: found[which][i] for which in MODELS}
            for i, token in enumerate(answer)
        ]

    def _complete(self, which: str, ids: list[int], **settings: Any) -> list[list[int]]:
        from capas.evaluation.generation import complete, generation_config

        config = generation_config(self.chat, self.max_new_tokens, **settings)
        with self._as(which) as model:
            return [completion.input_ids for completion in complete(model, [ids], config, 1)[0]]

    def _logits(self, which: str, ids: list[int], answer: list[int]) -> "torch.Tensor":
        """[answer + 1, vocabulary]: what the model expects for each token of the answer, and after it."""
        import torch

        inputs = torch.tensor([ids + answer], device=self.tuned.model.device)
        with torch.inference_mode(), self._as(which) as model:
            return model(inputs).logits[0, len(ids) - 1 :].float().cpu()

    def _probabilities(self, logits: "torch.Tensor", input_ids: list[int]) -> Iterator[Row]:
        from capas.evaluation.generation import next_token_probabilities

        top = logits.topk(NUM_TOKENS).indices.tolist()
        settings = {
            name: s.without() for name, s in self.generation.settings.items() if s.do_sample
        }
        for name, setting in {"unchanged": {}, **settings}.items():
            found = next_token_probabilities(logits, input_ids, setting)
            for token in top:
                yield {
                    "setting": name,
                    "token": self._decode([token]),
                    "probability": float(found[token]),
                }

    def _as(self, which: str) -> AbstractContextManager[Any]:
        return self.tuned.base() if which == "base" else nullcontext(self.tuned.model)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text


def compare_attention(model: Any, sequences: list[list[int]], stage: Stage) -> None:
    """Write how far the tuned model's logits differ between eager attention and sdpa; report the seconds."""
    from capas.evaluation import attention

    found = attention.compare(model, sequences)
    write_json(stage.out("reports/attention.json"), found.facts)
    if found.facts["skipped"]:
        log.info("eager attention and sdpa are not compared: %s", found.facts["skipped"])
        return
    stage.costs["attention_seconds"] = found.seconds
    log.info(
        "eager attention and sdpa: the largest difference of a logit is %.2g, in %.3f and %.3f seconds",
        found.facts["largest_logit_difference"], *found.seconds.values(),
    )  # fmt: skip


def choose_prompts(generation: Params, stage: Stage) -> list[Prompt]:
    """The user's own requests where there are some, else records of the test split."""
    requests = read_json(stage.dep(f"{COMPOSED}/prompts.json"))["prompts"]
    raw = read_records(stage.dep("data/raw") / "test.parquet", RAW)
    if requests:
        first = next(raw)
        system = first_system_message(first) if generation.system is None else generation.system
        is_text = first["messages"][0]["role"] == TEXT
        return own_prompts(requests, system, TEXT if is_text else "user")
    ids = [record["id"] for record in test_records(stage)]
    return held_out_prompts(raw, ids, generation.num_prompts)


def record_of(prompt: Prompt, stage: Stage) -> Row | None:
    """Return the formatted test record of a prompt; a request of the user's own has none."""
    return next((r for r in test_records(stage) if r["id"] == prompt.prompt_id), None)


def last_trained(labels: list[int]) -> tuple[int, int]:
    """Return the first position of the last run of trained tokens, and the position after it."""
    end = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    before = (i for i in range(end - 1, -1, -1) if labels[i] == IGNORE_INDEX)
    return next(before, -1) + 1, end


def test_records(stage: Stage) -> Iterator[Row]:
    return read_records(stage.dep(DATA) / "test.parquet", FORMATTED)


def seed_of(seed: int, prompt: Prompt, setting: str) -> int:
    """A number of 63 bits for every seed, prompt and setting."""
    text = json.dumps([seed, prompt.messages, setting], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def ask_wrongly(
    models: Models, prompts: list[Prompt], params: Params, stage: Stage
) -> Iterator[Row]:
    """The first setting once more, in a template that the model was not trained with."""
    text = stage.dep(f"{COMPOSED}/wrong_chat_template.jinja").read_text(encoding="utf-8")
    if params.generation.wrong_chat_template is None:
        return
    files = TokenizerFiles(stage.dep(TOKENIZER))
    called = f"the wrong chat template ({params.generation.wrong_chat_template})"
    wrong = Template(text, files.named, read_chat(stage)["date_string"], called)
    setting = next(iter(params.generation.settings))
    for prompt in prompts:
        if prompt.messages[0]["role"] == TEXT:
            continue  # no template at all
        try:
            ids = encode_wrongly(wrong, prompt, files)
        except CapasError as refusal:  # the row is an illustration, no reason to stop
            log.info("%s is not asked in the wrong template: %s", prompt.prompt_id, refusal)
            continue
        for which in MODELS:
            yield models.ask(which, prompt, ids, setting) | {"template": "wrong"}


def encode_wrongly(template: Template, prompt: Prompt, files: TokenizerFiles) -> list[int]:
    """As a server with the wrong template would: control tokens that the tokenizer lacks fall to pieces.

    Raises:
        CapasError: the template refuses the conversation, its system message folded or not.
    """
    try:
        text = template.render(prompt.messages, True, prompt.tools)
    except TemplateRefusal:  # a family without system role
        folded = place_system(prompt.messages, "fold")
        text = template.render(folded, True, prompt.tools)
    return files.encode_parsing([text])[0]


def summarize(
    rows: list[Row],
    wrong_rows: list[Row],
    place: Row,
    generation: Params,
    scorer: Scorer,
    questions: Mapping[str, str],
) -> Row:
    """How often answers differ (1 / num_return_sequences: never), and how good they are.

    Args:
        questions: {prompt_id: what is asked}, for a metric of the user's own.
    """
    count, metric = generation.num_return_sequences, next(iter(scorer.names), None)

    def scores(chosen: list[Row]) -> Row:
        found = []
        for row in chosen:
            if metric is None or row["reference"] is None:
                continue
            name = row["prompt_id"]
            asked = {"id": name, "prompt": questions[name], "reference": row["reference"]}
            asked["metadata"] = ""
            found += [scorer.score(text, asked)[metric] for text in row["completions"]]
        return {
            "distinct_completion_rate": sum(row["num_distinct"] / count for row in chosen)
            / len(chosen),
            "score": sum(found) / len(found) if found else None,
        }

    def both(chosen: list[Row]) -> Row:
        return {which: scores([row for row in chosen if row["model"] == which]) for which in MODELS}

    return {
        "metric": metric,
        "num_prompts": len({row["prompt_id"] for row in rows}),
        "num_return_sequences": count,
        "settings": {
            name: both([r for r in rows if r["setting"] == name]) for name in generation.settings
        },
        "wrong_template": both(wrong_rows) if wrong_rows else None,
        "next_token": place,
    }


def write_lines(rows: list[Row], stage: Stage) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    stage.out("reports/samples.jsonl").write_text(lines, encoding="utf-8")


def to_markdown(prompts: list[Prompt], rows: list[Row]) -> str:
    """A table for each prompt: a line for each setting, base beside tuned."""
    parts = ["# Samples\n"]
    for prompt in prompts:
        parts.append(f"## {prompt.prompt_id}\n")
        parts += [
            f"- {message['role']}: {as_code(message['content'])}" for message in prompt.messages
        ]
        parts += (
            [f"- expected: {as_code(prompt.reference)}"] if prompt.reference is not None else []
        )
        parts += ["\n| setting | base | tuned |", "|---|---|---|"]
        found = {
            (r["setting"], r["template"], r["model"]): r
            for r in rows
            if r["prompt_id"] == prompt.prompt_id
        }
        for setting, template in dict.fromkeys((s, t) for s, t, _ in found):
            cells = (as_cell(found[setting, template, which]["completions"]) for which in MODELS)
            name = setting if template == "right" else f"{setting}, wrong template"
            parts.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def as_cell(completions: list[str]) -> str:
    counts = {text: completions.count(text) for text in completions}
    return "<br>".join(as_code(text) + (f" ×{n}" if n > 1 else "") for text, n in counts.items())


def as_code(text: str) -> str:
    """As inline code; whatever a model wrote, it stays inside its cell."""
    fence = "``" if "`" in text else "`"
    inner = text.replace("|", "\\|").replace("\r", "␍").replace("\n", "⏎")
    inner = re.sub("`(?=`)", "` ", inner)  # two in a row would close it
    return f"{fence} {inner} {fence}" if inner.strip() else "(empty)"


def load_tokenizer(stage: Stage) -> Tokenizer:
    return Tokenizer.from_file(str(stage.dep(TOKENIZER) / "tokenizer.json"))


def read_chat(stage: Stage) -> dict[str, Any]:
    return read_json(stage.dep(DATA) / "chat.json")


if __name__ == "__main__":
    run("sample", main)
