"""Ways to generate the same greedy answers, side by side: CPU seconds, and how many texts differ.

    python benchmarks/generate.py                         the embedded model, tuned, on its test split
    python benchmarks/generate.py --model /tmp/smollm2    SmolLM2-135M-Instruct, made by benchmarks/smollm2.py
    python benchmarks/generate.py --prompts 8 --turns 1   a short run

alone        `model.generate`, one prompt at a time: the texts that the other ways are compared with
in_order     batches of 64 in the order of the records
by_length    batches of prompts of similar length
rows_leave   by_length, and rows that have ended leave the batch
prefix       by_length, and the tokens with which all prompts begin are computed once
capas        all three: `capas.evaluation.generation.complete`
continuous   transformers' `generate_batch`, paged, 128 blocks

SmolLM2 is asked support questions (benchmarks/real_model.py), and every other time to repeat one word: its
answers have very different lengths. One thread, so that CPU seconds count on a busy machine; turns are
interleaved, the best of each way counts, and ratios are taken within one run.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from real_model import CASES, ITEMS, NAMES
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from capas.chat.recorded import load_tokenizer, read_chat
from capas.core.params import Params
from capas.core.records import FORMATTED, read_records
from capas.evaluation.generation import complete, generation_config, pad_left
from capas.evaluation.greedy import decode
from capas.evaluation.prefix import Prefix, shared_length, shared_prefix
from capas.models.coverage import unwrapped
from capas.models.loading import attach_adapter, load_model

ROOT = Path(__file__).resolve().parents[1]
NUM_BLOCKS, MAX_BATCH_TOKENS = 128, 256  # their defaults take 20 times as long on a CPU
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LOADED_AS = {"dtype": "float32", "attn_implementation": "sdpa", "trust_remote_code": False}

Ids = list[list[int]]
Batch = Callable[[Ids], Ids]


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    model, chat, prompts = (smollm2 if options.model else embedded)(options)
    config = generation_config(chat, options.limit)
    ways = ways_of(model, config, options.batch_size)
    complete(model, prompts[:1], config, 1)  # what is done once
    turns = [
        {name: timed(way, prompts) for name, way in ways.items()} for _ in range(options.turns)
    ]
    print(json.dumps(report(turns, prompts, config, options), indent=2))


def embedded(options: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Any], Ids]:
    """The tuned model of the default, and the prompts of its test split."""
    data, models = ROOT / "data/formatted", ROOT / "data/models"
    base = load_model(models / "quantized", Params(LOADED_AS, "model"), torch.device("cpu"))
    records = list(read_records(data / "test.parquet", FORMATTED))[: options.prompts]
    prompts = [record["prompt_ids"] for record in records]
    return attach_adapter(base, models / "adapter"), read_chat(data), prompts


def smollm2(options: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Any], Ids]:
    """SmolLM2, and prompts with long and with short answers, under its own system prompt."""
    model = load_model(options.model, Params(LOADED_AS, "model"), torch.device("cpu"))
    tokenizer, rng = load_tokenizer(options.model), random.Random(0)
    texts = [question(rng, is_short=i % 2 == 1) for i in range(options.prompts)]
    turns = [f"system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{text}" for text in texts]
    chats = [f"<|im_start|>{turn}<|im_end|>\n<|im_start|>assistant\n" for turn in turns]
    found = tokenizer.encode_batch(chats, add_special_tokens=False)
    chat = {"bos_token_id": 1, "pad_token_id": 2, "stop_token_ids": [2]}
    return model, chat, [encoding.ids for encoding in found]


def question(rng: random.Random, is_short: bool) -> str:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    if is_short:
        return f"Repeat this word and say nothing else: {item}"
    numbers = {"day": rng.randrange(1, 29), "order": rng.randrange(10_000, 100_000)}
    text, _ = rng.choice(CASES)
    return text.format(name=name, item=item, amount=rng.randrange(5, 500), **numbers)


def ways_of(
    model: PreTrainedModel, config: GenerationConfig, batch_size: int
) -> dict[str, Callable[[Ids], Ids]]:
    """Return {name: way}; a way takes the prompts and returns the new tokens of each, in their order."""
    plain = partial(generate, model, config)
    leave = partial(rows_leave, model, config)
    return {
        "alone": lambda prompts: in_batches(plain, prompts, range(len(prompts)), 1),
        "in_order": lambda prompts: in_batches(plain, prompts, range(len(prompts)), batch_size),
        "by_length": lambda prompts: in_batches(plain, prompts, by_length(prompts), batch_size),
        "rows_leave": lambda prompts: in_batches(leave, prompts, by_length(prompts), batch_size),
        "prefix": lambda prompts: in_batches(
            partial(generate, model, config, prefix=shared_prefix(model, prompts, config)),
            prompts,
            by_length(prompts),
            batch_size,
        ),
        "capas": lambda prompts: [
            group[0].input_ids for group in complete(model, prompts, config, batch_size)
        ],
        "continuous": partial(continuous, model, config),
    }


def in_batches(batch: Batch, prompts: Ids, order: Any, batch_size: int) -> Ids:
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found.update(zip(chosen, batch([prompts[i] for i in chosen]), strict=True))
    return [found[i] for i in range(len(prompts))]


def by_length(prompts: Ids) -> list[int]:
    return sorted(range(len(prompts)), key=lambda i: len(prompts[i]))


def generate(
    model: PreTrainedModel, config: GenerationConfig, prompts: Ids, prefix: Prefix | None = None
) -> Ids:
    ids, mask = (part.to(model.device) for part in pad_left(prompts, config.pad_token_id))
    known = (
        {"past_key_values": prefix.cache_of([ids.shape[1] - len(p) for p in prompts])}
        if prefix
        else {}
    )
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **known)
    return found[:, ids.shape[1] :].tolist()


def rows_leave(model: PreTrainedModel, config: GenerationConfig, prompts: Ids) -> Ids:
    with torch.inference_mode():
        return decode(model, *pad_left(prompts, config.pad_token_id), config)


def continuous(
    model: PreTrainedModel,
    config: GenerationConfig,
    prompts: Ids,
    num_blocks: int = NUM_BLOCKS,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> Ids:
    paged = ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=max_batch_tokens)
    found = unwrapped(model).generate_batch(
        prompts, generation_config=config, continuous_batching_config=paged
    )
    answers = {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}
    return [answers[tuple(prompt)] for prompt in prompts]


def timed(way: Callable[[Ids], Ids], prompts: Ids) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    found = way(prompts)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "answers": found}


def report(
    turns: list[dict[str, Any]],
    prompts: Ids,
    config: GenerationConfig,
    options: argparse.Namespace,
) -> dict[str, Any]:
    best = {
        name: min((turn[name] for turn in turns), key=lambda one: one["cpu_seconds"])
        for name in turns[0]
    }
    texts = {
        name: [until_stop(row, config) for row in one["answers"]] for name, one in best.items()
    }
    lengths = [len(text) for text in texts["alone"]]
    before = best["by_length"]["cpu_seconds"]
    return {
        "num_prompts": len(prompts),
        "batch_size": options.batch_size,
        "prompt_tokens": spread([len(prompt) for prompt in prompts]),
        "shared_prompt_tokens": shared_length(prompts),
        "answer_tokens": spread(lengths),
        "ways": {
            name: {
                "cpu_seconds": round(one["cpu_seconds"], 2),
                "seconds": round(one["seconds"], 2),
                "times_as_fast_as_by_length": round(before / one["cpu_seconds"], 2),
                "num_texts_unlike_alone": sum(map(list.__ne__, texts[name], texts["alone"])),
            }
            for name, one in best.items()
        },
        "num_threads": options.threads,
        **machine.describe("torch", "transformers", "peft", "bitsandbytes"),
    }


def until_stop(row: list[int], config: GenerationConfig) -> list[int]:
    """Return the tokens before the first end token."""
    stops = [i for i, token in enumerate(row) if token in config.eos_token_id]
    return row[: stops[0]] if stops else row


def spread(lengths: list[int]) -> dict[str, float]:
    return {"min": min(lengths), "mean": round(statistics.mean(lengths), 1), "max": max(lengths)}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="the folder that benchmarks/smollm2.py made")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, default=65, help="tokens of an answer")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_options())
