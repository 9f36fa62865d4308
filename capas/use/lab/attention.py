"""Compute attention with `eager` and with `sdpa`: the same mathematics, different rounding and time."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capas.core.language import Language
from capas.use.lab.questions import Questions, questions

ROUNDS = 3  # the fastest counts: other processes can slow a round down, but nothing speeds it up


def run(root: Path, count: int, language: Language) -> Iterator[str]:
    """Yield how far logits and answers differ, and how long each implementation takes.

    Raises:
        CapasError: the model lacks one of them.
    """
    logits, answers = {}, {}
    seconds: dict[str, float] = {}
    with questions(root, count) as test, test.served() as served:
        from capas.evaluation.attention import IMPLEMENTATIONS, switched
        from capas.models.coverage import unwrapped

        model = unwrapped(served.model)
        for _ in range(ROUNDS):
            for name in IMPLEMENTATIONS:
                with switched(model, name):
                    started = time.perf_counter()
                    logits[name] = logits_of(served, test)
                    taken = time.perf_counter() - started
                    seconds[name] = min(seconds.get(name, taken), taken)
        for name in IMPLEMENTATIONS:
            with switched(model, name):
                answers[name] = test.ask(served).completions
    eager, sdpa = (logits[name] for name in IMPLEMENTATIONS)
    pairs = zip(answers["eager"], answers["sdpa"], strict=True)
    facts = {
        "count": len(test.records),
        "num_logits": eager.numel(),
        "difference": float((eager - sdpa).abs().max()),
        "largest": float(eager.abs().max()),
        "same_token": float((eager.argmax(-1) == sdpa.argmax(-1)).float().mean()),
        "same_answer": sum(one == other for one, other in pairs),
        **{f"{name}_seconds": seconds[name] for name in IMPLEMENTATIONS},
    }
    for key in ("difference", "same", "seconds", "finding"):
        yield language.say(f"attention.{key}", **facts).unescape()


def logits_of(served: Any, test: Questions) -> Any:
    """Return the logits [tokens, vocabulary] after each token of every record."""
    import torch

    from capas.training.batches import Collator, make_example

    size, collator = test.params.evaluation.batch_size, Collator(served.chat["pad_token_id"])
    ordered = sorted(test.records, key=lambda record: len(record["input_ids"]))
    found = []
    with torch.inference_mode():
        for start in range(0, len(ordered), size):
            batch = collator([make_example(record) for record in ordered[start : start + size]])
            mask = batch["attention_mask"].bool()
            inputs = {k: batch[k].to(served.model.device) for k in ("input_ids", "attention_mask")}
            found.append(served.model(**inputs).logits.float().cpu()[mask])
    return torch.cat(found)
