"""Likelihoods of labels after a prompt computed once, beside those of whole sequences: CPU seconds.

    python benchmarks/labels.py                          the embedded model, 20 prompts of its test split
    python benchmarks/labels.py --model /tmp/smollm2     SmolLM2-135M-Instruct, made by benchmarks/smollm2.py

Each prompt is followed by each of `--labels` labels of two tokens and an end token. One thread, so that CPU
seconds count on a busy machine; both take turns, and the best of each counts. Prints a JSON object.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import machine
import torch
from generate import embedded, smollm2
from transformers import PreTrainedModel

from capas.evaluation.label_batches import score_after_prompt, score_whole, shares_prompts
from capas.training.batches import Collator

BATCH_SIZE = 64


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model, chat, prompts = (smollm2 if options.model else embedded)(options)
    assert shares_prompts(model)
    records = [{"prompt_ids": ids} for ids in prompts]
    end = chat["stop_token_ids"][0]
    endings = [([200 + i, 300 + i, end], [200 + i, 300 + i, end]) for i in range(options.labels)]
    ways = {"after_prompt": score_after_prompt, "whole": score_whole}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(options.turns):
        for name, way in ways.items():
            started = time.process_time()
            found[name] = way(model, records, endings, Collator(chat["pad_token_id"]), BATCH_SIZE)
            seconds[name].append(time.process_time() - started)
    best = {name: min(each) for name, each in seconds.items()}
    facts = {
        "model": model_name(model, options),
        "prompts": len(prompts),
        "mean_prompt_tokens": round(statistics.fmean(map(len, prompts)), 1),
        "labels": options.labels,
        "cpu_seconds": {name: round(value, 2) for name, value in best.items()},
        "share_of_cpu_seconds": round(best["after_prompt"] / best["whole"], 3),
        "largest_difference_nats": float((found["after_prompt"] - found["whole"]).abs().max()),
        "same_first_label": bool(
            (found["after_prompt"].argmax(1) == found["whole"].argmax(1)).all()
        ),
    }
    print(json.dumps({**facts, **machine.describe("torch", "transformers")}, indent=2))


def model_name(model: PreTrainedModel, options: argparse.Namespace) -> str:
    kind = "SmolLM2-135M-Instruct" if options.model else "embedded"
    return f"{kind}, {sum(p.numel() for p in model.parameters()):,} parameters"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--labels", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    main(parser.parse_args())
