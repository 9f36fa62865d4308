"""Summarize the sampled completions: scores by setting, and tables in Markdown."""

import re
from collections.abc import Mapping

from capas.core.params import Params
from capas.evaluation.decoding import MODELS
from capas.evaluation.predictions import Row
from capas.evaluation.prompts import Prompt
from capas.evaluation.scorer import Scorer


def summarize(
    rows: list[Row],
    wrong_rows: list[Row],
    place: Row,
    generation: Params,
    scorer: Scorer,
    questions: Mapping[str, str],
) -> Row:
    """Return scores by setting and model, and the rate of distinct completions.

    The rate is 1 / num_return_sequences if all completions are equal.

    Args:
        questions: {prompt_id: question}, for a metric of the user's own.
    """
    count, metric = generation.num_return_sequences, next(iter(scorer.names), None)

    def scores(chosen: list[Row]) -> Row:
        found = []
        for row in chosen:
            if metric is None or row["reference"] is None:
                continue
            name = row["prompt_id"]
            record = {"id": name, "prompt": questions[name], "reference": row["reference"]}
            record["metadata"] = ""
            found += [scorer.score(text, record)[metric] for text in row["completions"]]
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


def to_markdown(prompts: list[Prompt], rows: list[Row]) -> str:
    """Return a table for each prompt: a row for each setting, base beside tuned."""
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
    """Return text as inline code that stays inside its table cell, whatever a model wrote."""
    fence = "``" if "`" in text else "`"
    inner = text.replace("|", "\\|").replace("\r", "␍").replace("\n", "⏎")
    inner = re.sub("`(?=`)", "` ", inner)  # two in a row would close the code
    return f"{fence} {inner} {fence}" if inner.strip() else "(empty)"
