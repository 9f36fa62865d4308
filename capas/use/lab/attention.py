"""Compute attention with `eager` and with `sdpa`: the same mathematics, different rounding and time."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capas.core.language import Language
from capas.use.lab.questions import Questions, questions

WAYS = ("eager", "sdpa")
ROUNDS = 3  # the fastest counts: other processes can slow a round down, but nothing speeds it up


def run(root: Path, count: int, language: Language) -> Iterator[str]:
    """Yield how far logits and answers differ, and how long each implementation takes."""
    with questions(root, count) as asked:
        logits, seconds, answers = {}, dict.fromkeys(WAYS, float("inf")), {}
        models = {}
        for way in WAYS:
            with asked.served(model={"attn_implementation": way}) as served:
                models[way] = served
        for _ in range(ROUNDS):
            for way, served in models.items():
                started = time.perf_counter()
                logits[way] = logits_of(served, asked)
                seconds[way] = min(seconds[way], time.perf_counter() - started)
        for way, served in models.items():
            answers[way] = asked.ask(served).completions
    eager, sdpa = (logits[way] for way in WAYS)
    pairs = zip(answers["eager"], answers["sdpa"], strict=True)
    facts = {
        "count": len(asked.records),
        "num_logits": eager.numel(),
        "difference": float((eager - sdpa).abs().max()),
        "largest": float(eager.abs().max()),
        "same_token": float((eager.argmax(-1) == sdpa.argmax(-1)).float().mean()),
        "same_answer": sum(one == other for one, other in pairs),
        **{f"{way}_seconds": seconds[way] for way in WAYS},
    }
    for key in ("difference", "same", "seconds", "finding"):
        yield language.say(f"attention.{key}", **facts).unescape()


def logits_of(served: Any, asked: Questions) -> Any:
    """Return the logits [tokens, vocabulary] after each token of every record."""
    import torch

    from capas.training.batches import Collator, make_example

    size, collator = asked.params.evaluation.batch_size, Collator(served.chat["pad_token_id"])
    ordered = sorted(asked.records, key=lambda record: len(record["input_ids"]))
    found = []
    with torch.inference_mode():
        for start in range(0, len(ordered), size):
            batch = collator([make_example(record) for record in ordered[start : start + size]])
            mask = batch["attention_mask"].bool()
            inputs = {k: batch[k].to(served.model.device) for k in ("input_ids", "attention_mask")}
            found.append(served.model(**inputs).logits.float().cpu()[mask])
    return torch.cat(found)
