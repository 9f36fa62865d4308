"""Let base and tuned model answer the same prompts over a grid of decoding settings.

Reads   data/composed (templates, prompts), data/formatted, data/models/{adapter,quantized,tokenizer}, data/raw (test)
Writes  reports/samples.jsonl, reports/samples.md, reports/samples.json, reports/next_token.csv
Params  chat_template, generation, hardware, model

The travelling record at its end, in samples.jsonl:

    {"prompt_id": "test-7", "setting": "greedy", "model": "base", "completions": ["Okay, 99 minutes from now."], ...}
    {"prompt_id": "test-7", "setting": "greedy", "model": "tuned", "completions": ["{\\"name\\": \\"set_timer\\", ...}"], ...}
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from capas import hardware, metrics
from capas.chat import ChatFormat
from capas.errors import CapasError
from capas.facts import rounded, write_csv, write_json
from capas.params import Params
from capas.prompts import Prompt, first_system_message, held_out_prompts, own_prompts
from capas.records import FORMATTED, RAW, read_records
from capas.stage import Stage, log, run
from capas.template import Template, TemplateRefusal, place_system
from capas.tokenizer import TokenizerFiles

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
COMPOSED, DATA, TOKENIZER = "data/composed", "data/formatted", "data/models/tokenizer"
MODELS = ("base", "tuned")
NUM_TOKENS = 8  # of a next-token distribution


def main(params: Params, stage: Stage) -> None:
    device = hardware.prepare(params.hardware)  # before torch is imported
    from capas.model import attach_adapter, load_model

    right = load_format(params, stage)
    prompts = choose_prompts(params.generation, stage)
    base = load_model(stage.dep("data/models/quantized"), params.model, device)
    model = attach_adapter(base, stage.dep("data/models/adapter"))

    rows = [
        ask(model, which, prompt, right.prompt_ids(prompt.messages), setting, params.generation, stage)
        for prompt in prompts
        for setting in params.generation.settings
        for which in MODELS
    ]
    wrong_rows = list(ask_wrongly(model, prompts, params, stage))
    position, probabilities = next_token(model, prompts[0], right, params.generation, stage)

    write_lines(rows + wrong_rows, stage)
    write_json(stage.out("reports/samples.json"), summarize(rows, wrong_rows, position, params.generation))
    columns = ("setting", "model", "token", "probability")
    write_csv(stage.out("reports/next_token.csv"), columns, probabilities)
    stage.out("reports/samples.md").write_text(to_markdown(prompts, rows + wrong_rows), encoding="utf-8")
    log.info("%d prompts, %d settings", len(prompts), len(params.generation.settings))


def load_format(params: Params, stage: Stage) -> ChatFormat:
    """The template of this run.

    Raises:
        CapasError: template and tokenizer encode other ids now than when the records were formatted.
    """
    text = stage.dep(f"{COMPOSED}/chat_template.jinja").read_text(encoding="utf-8")
    options = params.chat_template
    chat_format = ChatFormat.load(text, stage.dep(TOKENIZER), options.date_string, options.system)
    if chat_format.probes_sha256() != read_chat(stage)["probes_sha256"]:
        raise CapasError(
            f"{COMPOSED}/chat_template.jinja and {TOKENIZER} do not encode as they did for {DATA}: the model would "
            "be asked in another format than it was trained in. Run `dvc repro`."
        )
    return chat_format


def choose_prompts(generation: Params, stage: Stage) -> list[Prompt]:
    """The user's own requests where there are some, else records of the test split."""
    requests = json.loads(stage.dep(f"{COMPOSED}/prompts.json").read_text(encoding="utf-8"))["prompts"]
    raw = list(read_records(stage.dep("data/raw") / "test.parquet", RAW))
    if requests:
        return own_prompts(requests, first_system_message(raw) if generation.system is None else generation.system)
    ids = [record["id"] for record in read_records(stage.dep(DATA) / "test.parquet", FORMATTED)]
    return held_out_prompts(raw, ids, generation.num_prompts)


def ask(
    model: Any, which: str, prompt: Prompt, ids: list[int], setting: str, generation: Params, stage: Stage
) -> Row:
    """The completions of one prompt under one setting. Its seed is its own: no other prompt moves them."""
    import torch

    from capas.generation import complete, generation_config

    settings = generation.settings[setting].without()
    count = generation.num_return_sequences if settings["do_sample"] else 1
    config = generation_config(
        read_chat(stage), generation.max_new_tokens, num_return_sequences=count, **settings
    )
    torch.manual_seed(seed_of(generation.seed, prompt, setting))
    with model.disable_adapter() if which == "base" else nullcontext():
        found = complete(model, [ids], config, batch_size=1)[0]
    texts = decode([completion.input_ids for completion in found], stage)
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


def seed_of(seed: int, prompt: Prompt, setting: str) -> int:
    """A number of 63 bits for every seed, prompt and setting."""
    text = json.dumps([seed, prompt.messages, setting], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def ask_wrongly(model: Any, prompts: list[Prompt], params: Params, stage: Stage) -> Iterator[Row]:
    """The first setting once more, in a template that the model was not trained with."""
    wrong = stage.dep(f"{COMPOSED}/wrong_chat_template.jinja").read_text(encoding="utf-8")
    if params.generation.wrong_chat_template is None:
        return
    setting = next(iter(params.generation.settings))
    for prompt in prompts:
        ids = encode_wrongly(wrong, prompt, params, stage)
        for which in MODELS:
            row = ask(model, which, prompt, ids, setting, params.generation, stage)
            yield row | {"template": "wrong"}


def encode_wrongly(template: str, prompt: Prompt, params: Params, stage: Stage) -> list[int]:
    """As a server with the wrong template would: control tokens that the tokenizer lacks fall to pieces."""
    files = TokenizerFiles(stage.dep(TOKENIZER))
    render = Template(template, files.named, params.chat_template.date_string).render
    try:
        text = render(prompt.messages, add_generation_prompt=True)
    except TemplateRefusal:  # a family without system role
        text = render(place_system(prompt.messages, "fold"), add_generation_prompt=True)
    ids: list[int] = files.build(parse_special=True).encode(text, add_special_tokens=False).ids
    return ids


def next_token(
    model: Any, prompt: Prompt, right: ChatFormat, generation: Params, stage: Stage
) -> tuple[Row, list[Row]]:
    """The place in the tuned model's greedy answer where it wavers most, and its distribution there.

    Returns:
        The place (reports/samples.json), and rows of reports/next_token.csv: for each model its most probable
        tokens, with their probabilities before and after every setting that samples.
    """
    from capas.generation import complete, generation_config, next_token_probabilities

    ids = right.prompt_ids(prompt.messages)
    config = generation_config(read_chat(stage), generation.max_new_tokens)
    answer = complete(model, [ids], config, batch_size=1)[0][0].input_ids
    logits = {which: last_logits(model, which, ids + answer, len(answer) + 1) for which in MODELS}
    own = logits["tuned"].float().log_softmax(dim=-1)
    position = int((-(own.exp() * own).sum(dim=-1)).argmax())
    sampled = {name: s for name, s in generation.settings.items() if s.do_sample}
    rows = [
        {"setting": name, "model": which, "token": show(token, stage), "probability": float(probability[token])}
        for which in MODELS
        for top in [next_token_probabilities(logits[which][position], {}).topk(NUM_TOKENS).indices.tolist()]
        for name, settings in [("unchanged", {}), *((n, s.without()) for n, s in sampled.items())]
        for probability in [next_token_probabilities(logits[which][position], settings)]
        for token in top
    ]
    place = {
        "prompt_id": prompt.prompt_id,
        "position": position,
        "text_before": decode([answer[:position]], stage)[0],
        "tokens": [row["token"] for row in rows[-NUM_TOKENS:]],
    }
    return place, rows


def last_logits(model: Any, which: str, ids: list[int], count: int) -> "torch.Tensor":
    """[count, vocabulary]: what the model expects after each of the last `count` tokens."""
    import torch

    with torch.inference_mode(), model.disable_adapter() if which == "base" else nullcontext():
        logits: torch.Tensor = model(torch.tensor([ids], device=model.device)).logits[0, -count:].cpu()
    return logits


def summarize(rows: list[Row], wrong_rows: list[Row], position: Row, generation: Params) -> Row:
    """How often answers differ (1 / num_return_sequences where they never do), and how often they are right."""
    count = generation.num_return_sequences

    def scores(chosen: list[Row]) -> Row:
        asked = [row for row in chosen if row["reference"] is not None]
        answers = [(text, row["reference"]) for row in asked for text in row["completions"]]
        right = [metrics.exact_match(*answer) for answer in answers]
        return {
            "distinct_completion_rate": sum(row["num_distinct"] / count for row in chosen) / len(chosen),
            "exact_match": sum(right) / len(right) if right else None,
        }

    def both(chosen: list[Row]) -> Row:
        return {which: scores([row for row in chosen if row["model"] == which]) for which in MODELS}

    return {
        "num_prompts": len({row["prompt_id"] for row in rows}),
        "num_return_sequences": count,
        "settings": {name: both([r for r in rows if r["setting"] == name]) for name in generation.settings},
        "wrong_template": both(wrong_rows) if wrong_rows else None,
        "next_token": position,
    }


def write_lines(rows: list[Row], stage: Stage) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    stage.out("reports/samples.jsonl").write_text(lines, encoding="utf-8")


def to_markdown(prompts: list[Prompt], rows: list[Row]) -> str:
    """A table for each prompt: a line for each setting, base beside tuned."""
    parts = ["# Samples\n"]
    for prompt in prompts:
        parts.append(f"## {prompt.prompt_id}\n")
        parts += [f"- {message['role']}: {as_code(message['content'])}" for message in prompt.messages]
        parts += [f"- expected: {as_code(prompt.reference)}"] if prompt.reference is not None else []
        parts += ["\n| setting | base | tuned |", "|---|---|---|"]
        found = {(r["setting"], r["template"], r["model"]): r for r in rows if r["prompt_id"] == prompt.prompt_id}
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
    inner = text.replace("|", "\\|").replace("\r", "␍").replace("\n", "⏎").replace("``", "` `")
    return f"{fence} {inner} {fence}" if inner.strip() else "(empty)"


def decode(ids: list[list[int]], stage: Stage) -> list[str]:
    tokenizer = Tokenizer.from_file(str(stage.dep(TOKENIZER) / "tokenizer.json"))
    texts: list[str] = tokenizer.decode_batch(ids, skip_special_tokens=False)
    return texts


def show(token: int, stage: Stage) -> str:
    return decode([[token]], stage)[0]


def read_chat(stage: Stage) -> dict[str, Any]:
    chat: dict[str, Any] = json.loads((stage.dep(DATA) / "chat.json").read_text(encoding="utf-8"))
    return chat


if __name__ == "__main__":
    run("sample", main)
