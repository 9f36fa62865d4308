"""Write the model card of an adapter or a whole model: its origin, its scores, how it is loaded."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from capas.evaluation import gate

LOADING = "## How to load it"
_WHOLE = "All of its weights were trained on; it is not needed to use the model."
_GROUPS = ("lora", "quantization", "trainer")
_SCORES = ("loss", "perplexity", "token_accuracy", "stop_rate")  # after the chosen metrics


def write_card(
    run_id: str,
    key: str,
    values: Mapping[str, Any],
    served: Mapping[str, Any],
    source: Mapping[str, Any],
    base: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    initial: Mapping[str, Any] | None = None,
) -> str:
    """Return the card in Markdown, with the header that the Hub reads.

    Args:
        run_id: the MLflow run.
        key: the key of the training.
        values: params of the training, flat.
        served: the result of `capas.use.mlflow_model.served_facts`.
        source: data/raw/source.json.
        base, evaluation: the two reports of scores.
        initial: the adapter that the training started from, as recorded in the certificate.
    """
    whole = values["lora.r"] is None
    kind = "All weights trained of" if whole else "LoRA adapter of"
    parts = [
        _header(served["base"], source, whole),
        f"# {kind} {served['base']['model_name_or_path']}, training {key}",
        _made_from(served["base"], source, initial, whole),
        "## Scores on the test split",
        _scores(base, evaluation),
        "## Template",
        _template(values),
        LOADING,
        _loading(run_id, served["base"], whole),
        "## How to rebuild it",
        f"`capas rebuild {run_id}` in the repository that it comes from lays out the files as they were, "
        "trains again and compares the bytes.",
        "## Params of the training",
        _params(values),
    ]
    return "\n\n".join(parts) + "\n"


def _header(base: Mapping[str, Any], source: Mapping[str, Any], whole: bool) -> str:
    library = "transformers" if whole else "peft"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if base["licence"]:
        lines.append(f"license: {base['licence']}")
    if base["hub"]:
        lines.append(f"base_model: {base['model_name_or_path']}")
    if "/" in source["path"]:
        lines.append(f"datasets: [{json.dumps(source['path'])}]")
    return "\n".join([*lines, f"tags: [{'' if whole else 'lora, '}capas]", "---"])


def _made_from(
    base: Mapping[str, Any],
    source: Mapping[str, Any],
    initial: Mapping[str, Any] | None,
    whole: bool,
) -> str:
    revision = f" at `{base['revision']}`" if base["revision"] else ""
    lines = [
        f"- Base model: `{base['model_name_or_path']}`{revision}, licence {base['licence']}. "
        + (_WHOLE if whole else _base_weights(base))
    ]
    if initial is not None:
        lines.append(
            f"- Trained on from the adapter `{initial['adapter_name_or_path']}` at "
            f"`{initial['adapter_revision']}`, sha256 `{initial['sha256']}`."
        )
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
    for name in (*evaluation["metrics"], *_SCORES):
        if base.get(name) is None or tuned.get(name) is None:
            continue
        gain = difference.get(name)
        shown = f"{gain['mean']:+.4g} ({gain['low']:+.4g} to {gain['high']:+.4g})" if gain else ""
        rows.append(f"| {name} | {base[name]:.4g} | {tuned[name]:.4g} | {shown} |")
    judged = f"The gate: {gate.verdict(evaluation['gate'])}."
    return "\n".join([f"{tuned['num_records']:,} records. {judged}", "", *rows])


def _loading(run_id: str, base: Mapping[str, Any], whole: bool) -> str:
    before = "" if whole or base["packed"] or base["hub"] else "Set `CAPAS_BASE` first.\n\n"
    alone = (
        "With transformers alone: `AutoModelForCausalLM.from_pretrained(FOLDER)`"
        if whole
        else "With PEFT alone: `PeftModel.from_pretrained(base, FOLDER)`"
    )
    return (
        f"{before}With MLflow, greedy completions in the template of the training:\n\n"
        "```python\nimport mlflow, pandas as pd\n\n"
        f'model = mlflow.pyfunc.load_model("runs:/{run_id}/model")\n'
        'model.predict(pd.DataFrame({"prompt": ["..."]}))["completion"]\n```\n\n'
        "`messages`, a list of role and content (or that as JSON), instead of `prompt`, is a whole "
        f"conversation. {alone} on the folder `adapter`, whose tokenizer brings the chat template."
    )


def _template(values: Mapping[str, Any]) -> str:
    name = PurePosixPath(values["chat_template.path"]).stem
    return (
        f"`{name}` (`chat_template.jinja` beside the weights), which "
        "`tokenizer.apply_chat_template` uses. The end token was trained, and `generation_config.json` "
        "stops there."
    )


def for_hub(
    card: str,
    name: str,
    base: Mapping[str, Any],
    merged: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> str:
    """Return the card for a repository on the Hub.

    Args:
        card: the result of `write_card`.
        name: the repository, OWNER/NAME.
        base: `capas.use.mlflow_model.served_facts()["base"]`.
        merged: merge.json, if the repository holds the merged model.
        whole: whether all weights were trained.
    """
    before, _, rest = card.partition(f"\n\n{LOADING}\n\n")
    after = rest.partition("\n\n## ")[2]
    if merged is not None:
        before = before.replace("library_name: peft", "library_name: transformers", 1)
        before = before.replace("# LoRA adapter of", "# With its LoRA adapter merged in:", 1)
    code = _whole_code(name) if whole or merged is not None else _adapter_code(name, base)
    told = [LOADING, f"```python\n{code}\n```"]
    if merged is not None:
        told.append(
            f"Merged in {merged['dtype']}. Logits differ from those of base and adapter by at most "
            f"{merged['difference']:.2g} of the largest; the most probable next token is the same for "
            f"{merged['num_same_next_token']} of {merged['num_tokens']} tokens."
        )
    elif not whole and not base["hub"] and not base["packed"]:
        told.append(
            f"BASE is a folder with `{base['model_name_or_path']}`, which is not on the Hub."
        )
    return "\n\n".join([before, *told, f"## {after}"])


def _whole_code(name: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    )


def _adapter_code(name: str, base: Mapping[str, Any]) -> str:
    """Return code that loads the base as in the training: at its commit, with its quantization."""
    asked = base["quantization"]
    if base["packed"]:
        given = f'"{name}", subfolder="base"'
    elif base["hub"]:
        given = f'"{base["model_name_or_path"]}", revision="{base["revision"]}"'
    else:
        given = "BASE"
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer"
        + (", BitsAndBytesConfig" if asked else ""),
        "",
    ]
    if asked:
        words = ", ".join(f"{key}={value!r}" for key, value in asked.items())
        lines.append(f"quantization = BitsAndBytesConfig({words})")
        given += ", quantization_config=quantization"
    return "\n".join(
        [
            *lines,
            f"base = AutoModelForCausalLM.from_pretrained({given})",
            f'model = PeftModel.from_pretrained(base, "{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]
    )


def _params(values: Mapping[str, Any]) -> str:
    chosen = {key: v for key, v in values.items() if key.split(".")[0] in _GROUPS}
    lines = [f"| `{key}` | {json.dumps(chosen[key])} |" for key in sorted(chosen)]
    return "\n".join(["| param | value |", "|---|---|", *lines])
