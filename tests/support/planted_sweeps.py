"""Sweeps that never ran: trials with planted numbers, and what a page shows of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from capas.sweep.page import PAGES, Result
from capas.sweep.ranking import rank
from capas.sweep.state import DONE, FAILED, State

LOSS, SCORE = "train.validation_loss", "tuned.rougeL"
RATE = "trainer.learning_rate"
SETTINGS: dict[str, Any] = {
    **{"objective": LOSS, "direction": "minimize", "columns": ["auto"], "replicates": ["seed"]},
    **{"confidence_fraction": 0.95, "language": "en"},
}
HOSTILE = "<script>alert('1')</script>\"&{{ 7*7 }}"


def trial(loss: float, *overrides: str, **facts: Any) -> State:
    name = "-".join(overrides)
    return State(
        *(name, name, list(overrides)), status=facts.pop("status", DONE), headline=SCORE,
        metrics={LOSS: loss, SCORE: 0.25}, seconds=facts.pop("seconds", 10.0), **facts,
    )  # fmt: skip


def seeded(losses: Mapping[str, tuple[float, ...]]) -> list[State]:
    """A trial for each loss, with the seeds 1, 2, ...; a key of `losses` holds overrides, with blanks."""
    return [
        trial(loss, *words.split(), f"seed={seed}")
        for words, values in losses.items()
        for seed, loss in enumerate(values, 1)
    ]


def result(*states: State, defaults: tuple[str, ...] = (), **facts: Any) -> Result:
    settings = {**SETTINGS, **facts.pop("settings", {})}
    rows = rank(states, settings, [defaults] if defaults else [])
    failed = [state for state in states if state.status == FAILED]
    return Result(rows=rows, settings=settings, failed=failed, **facts)


def hostile() -> Result:
    """Values, reasons and an address that are code, and a value that is long."""
    words = [f"x.y={HOSTILE}", f"x.y={HOSTILE}{'long/' * 60}"]
    states = [trial(0.1 * i, word, "a.b=null") for i, word in enumerate(words, 1)]
    failed = replace(trial(1, "x.y=3", status=FAILED), reason=f"train: {HOSTILE}\nlast line")
    return result(
        *states, failed, words=words, swept={"x.y": tuple(words)},
        lessons={code: [f"{HOSTILE} is too low"] for code in PAGES},
        curves={HOSTILE: [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]},
        address=f"javascript:alert(1) {HOSTILE}",
    )  # fmt: skip


def wide() -> Result:
    """A hundred trials over eight keys: long lists and paths, null, and numbers with many digits."""
    modules, path = (
        "[q_proj,k_proj,v_proj,o_proj,gate_proj]",
        "data/own/a/long/way/to/the/records.jsonl",
    )
    keys = {
        **{
            "lora.target_modules": (modules, "all-linear"),
            "dataset.path": (path, "data/own/b.csv"),
        },
        **{
            "trainer.max_grad_norm": ("null", "1.0"),
            "evaluation.gate.max_forgetting": ("0.1", "0.2"),
        },
        **{"lora.use_rslora": ("true", "false"), "trainer.lr_scheduler_type": ("linear", "cosine")},
        **{"lora.r": ("4", "8", "16"), RATE: tuple(f"{1e-4 * 1.07**i:.17f}" for i in range(100))},
    }
    states = [
        trial(0.1 + i % 13 / 50, *(f"{key}={texts[i % len(texts)]}" for key, texts in keys.items()))
        for i in range(100)
    ]
    known = {
        state.name: {"num_train_tokens": 1e6 + 1e4 * (i % 7)} for i, state in enumerate(states)
    }
    words = [f"{key}={','.join(texts)}" for key, texts in keys.items()]
    return result(*states, swept=keys, words=words, known_costs=known, searches=True)
