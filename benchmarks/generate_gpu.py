"""Greedy answers of an 8 B model on one GPU: tokens a second of three ways, one way a run.

    python benchmarks/generate_gpu.py plain           `model.generate`, batches in the order of the records
    python benchmarks/generate_gpu.py capas           by length, rows that have ended leave, a shared prefix
    python benchmarks/generate_gpu.py continuous      transformers' `generate_batch` with --blocks blocks
    python benchmarks/generate_gpu.py capas --device cpu --shape tiny      a dry run, anywhere

The model has Llama-3.1-8B's shape and random weights in bfloat16. Every 64th token ends an answer, so that
answers have different lengths, as real ones do. Prompts share their first 200 tokens (a system prompt with
tools). Prints a JSON object; the first batch is not timed.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial

import machine
import torch
from generate import Ids, continuous, generate, in_batches, until_stop
from train_gpu import SHAPES, VOCABULARY
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from capas.evaluation.generation import complete, generation_config

PAD, EVERY = 0, 64  # every 64th token ends an answer
SHARED, OWN = 200, (20, 200)  # tokens of a prompt


def main(options: argparse.Namespace) -> None:
    transformers_logging.set_verbosity_error()
    model, rng = make_model(options), random.Random(0)
    prompts = make_prompts(rng, options.prompts, VOCABULARY[options.shape])
    stops = list(range(1, VOCABULARY[options.shape], EVERY))
    chat = {"bos_token_id": None, "pad_token_id": PAD, "stop_token_ids": stops}
    config = generation_config(chat, options.limit)
    answer = ways_of(model, config, options)[options.way]
    answer(prompts[: options.batch_size])
    started = now(options.device)
    found = answer(prompts)
    seconds = now(options.device) - started
    num_tokens = sum(len(until_stop(row, config)) for row in found)
    facts = {
        "way": options.way,
        "shape": options.shape,
        "device": options.device,
        "prompts": len(prompts),
        "batch_size": options.batch_size,
        "blocks": options.blocks if options.way == "continuous" else None,
        "answer_tokens": num_tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(num_tokens / seconds, 1),
        "peak_memory_gib": peak_gib(options.device),
        **machine.describe("torch", "transformers"),
    }
    if options.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    print(json.dumps(facts, indent=2))


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY[options.shape],
        max_position_embeddings=8192,
        pad_token_id=PAD,
        **SHAPES[options.shape],
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def make_prompts(rng: random.Random, count: int, vocabulary: int) -> Ids:
    shared = [rng.randrange(1, vocabulary) for _ in range(SHARED)]
    return [
        shared + [rng.randrange(1, vocabulary) for _ in range(rng.randint(*OWN))]
        for _ in range(count)
    ]


def ways_of(
    model: LlamaForCausalLM, config: GenerationConfig, options: argparse.Namespace
) -> dict[str, Callable[[Ids], Ids]]:
    """Return {name: way}; a way takes the prompts and returns the new tokens of each, in their order."""
    size, paged = options.batch_size, (options.blocks, options.batch_tokens)
    plain = partial(generate, model, config)
    return {
        "plain": lambda prompts: in_batches(plain, prompts, range(len(prompts)), size),
        "capas": lambda prompts: [
            group[0].input_ids for group in complete(model, prompts, config, size)
        ],
        "continuous": lambda prompts: continuous(model, config, prompts, *paged),
    }


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib(device: str) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == "cuda" else None


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=("plain", "capas", "continuous"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--blocks", type=int, default=2048, help="of the paged cache")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="in a paged batch")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_options())
