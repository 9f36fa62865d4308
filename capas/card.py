"""The card of an adapter: what it was made from, what it scores, how it is loaded."""

import json
from collections.abc import Mapping
from typing import Any

from capas import gate

_GROUPS = ("lora", "quantization", "trainer")
_SCORES = ("exact_match", "valid_json", "loss", "perplexity", "token_accuracy", "stop_rate")


def write_card(
    run_id: str,
    key: str,
    values: Mapping[str, Any],
    served: Mapping[str, Any],
    source: Mapping[str, Any],
    base: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> str:
    """Markdown with the header that the Hub reads.

    Args:
        values: params of the training, flat.
        served: `capas.bundle.served_facts`.
        source: data/raw/source.json.
        base, evaluation: the two reports of scores.
    """
    parts = [
        _header(served["base"], source),
        f"# LoRA adapter of {served['base']['model_name_or_path']}, training {key}",
        _made_from(served["base"], source),
        "## Scores on the test split",
        _scores(base, evaluation),
        "## How to load it",
        _loading(run_id, served["base"]),
        "## Params of the training",
        _params(values),
    ]
    return "\n\n".join(parts) + "\n"


def _header(base: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation"]
    if base["hub"]:
        lines.append(f"base_model: {base['model_name_or_path']}")
    if "/" in source["path"]:
        lines.append(f"datasets: [{json.dumps(source['path'])}]")
    return "\n".join([*lines, "tags: [lora, capas]", "---"])


def _made_from(base: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    revision = f" at `{base['revision']}`" if base["revision"] else ""
    lines = [
        f"- Base model: `{base['model_name_or_path']}`{revision}, licence {base['licence']}. "
        + _base_weights(base)
    ]
    for origin in source["sources"]:
        at = f" at `{origin['revision']}`" if origin["revision"] else ""
        lines.append(
            f"- Dataset: `{origin['path']}`{at}, licence {origin['licence']}, "
            f"{origin['num_records']:,} records"
        )
    splits = ", ".join(f"{name} {s['num_records']:,}" for name, s in source["splits"].items())
    lines.append(f"- Records by split: {splits}")
    return "\n".join(lines)


def _base_weights(base: Mapping[str, Any]) -> str:
    if base["packed"]:
        return "Its weights, as they were trained on, are in `data/base` of the MLflow model."
    if base["hub"]:
        return "Its weights are not in here: they come from the Hub, or from its cache."
    return "Its weights are not in here: `CAPAS_BASE` must name a folder with them."


def _scores(base: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    tuned, difference = evaluation["tuned"], evaluation["difference"]
    confidence = f"{evaluation['confidence_fraction']:.0%} interval"
    rows = ["| score | base | tuned | difference, " + confidence + " |", "|---|---|---|---|"]
    for name in _SCORES:
        if base.get(name) is None or tuned.get(name) is None:
            continue
        gain = difference.get(name)
        shown = f"{gain['mean']:+.4g} ({gain['low']:+.4g} to {gain['high']:+.4g})" if gain else ""
        rows.append(f"| {name} | {base[name]:.4g} | {tuned[name]:.4g} | {shown} |")
    judged = f"The gate: {gate.verdict(evaluation['gate'])}."
    return "\n".join([f"{tuned['num_records']:,} records. {judged}", "", *rows])


def _loading(run_id: str, base: Mapping[str, Any]) -> str:
    before = "" if base["packed"] or base["hub"] else "Set `CAPAS_BASE` first.\n\n"
    return (
        f"{before}With MLflow, greedy completions in the template of the training:\n\n"
        "```python\nimport mlflow, pandas as pd\n\n"
        f'model = mlflow.pyfunc.load_model("runs:/{run_id}/model")\n'
        'model.predict(pd.DataFrame({"prompt": ["..."]}))["completion"]\n```\n\n'
        "`messages`, a list of role and content (or that as JSON), instead of `prompt`, is a whole "
        "conversation. With PEFT alone: `PeftModel.from_pretrained(base, FOLDER)` on the folder `adapter`, "
        "whose tokenizer brings the chat template."
    )


def _params(values: Mapping[str, Any]) -> str:
    chosen = {key: v for key, v in values.items() if key.split(".")[0] in _GROUPS}
    lines = [f"| `{key}` | {json.dumps(chosen[key])} |" for key in sorted(chosen)]
    return "\n".join(["| param | value |", "|---|---|", *lines])
