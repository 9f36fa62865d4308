"""Write the model card of an adapter or a whole model: its origin, its scores, how it is loaded."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from capas.evaluation import gate
from capas.evaluation.names import LABEL_SCORES

TEMPLATE = Path(__file__).with_name("card.md.jinja")
LOADING = "## How to load it"  # a heading of the template
_GROUPS = ("lora", "quantization", "trainer")
_SCORES = (  # after the chosen metrics
    *(*LABEL_SCORES, "loss", "perplexity", "token_accuracy", "stop_rate"),
)


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
    from huggingface_hub import ModelCard, ModelCardData

    base_model, whole = served["base"], values["lora.r"] is None
    data = ModelCardData(
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        license=base_model["licence"],
        base_model=base_model["model_name_or_path"] if base_model["hub"] else None,
        datasets=[source["path"]] if "/" in source["path"] else None,
        tags=["capas"] if whole else ["lora", "capas"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        at=lambda revision: f" at `{revision}`" if revision else "",
        base=base_model,
        confidence=f"{evaluation['confidence_fraction']:.0%}",
        gate=gate.verdict(evaluation["gate"]),
        initial=initial,
        key=key,
        num_records=evaluation["tuned"]["num_records"],
        params=_of_training(values),
        run_id=run_id,
        scores=list(_scores(base, evaluation)),
        source=source,
        template=PurePosixPath(values["chat_template.path"]).stem,
        whole=whole,
    )
    return f"{str(card).rstrip()}\n"


def _scores(base: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield a row for each score that both models have."""
    tuned, difference = evaluation["tuned"], evaluation["difference"]
    for name in (*evaluation["metrics"], *_SCORES):
        if base.get(name) is None or tuned.get(name) is None:
            continue
        gain = difference.get(name)
        shown = f"{gain['mean']:+.4g} ({gain['low']:+.4g} to {gain['high']:+.4g})" if gain else ""
        numbers = {"base": f"{base[name]:.4g}", "tuned": f"{tuned[name]:.4g}"}
        yield {"name": name, **numbers, "difference": shown}


def _of_training(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the params that describe the training, as JSON, sorted by key."""
    chosen = {key: v for key, v in values.items() if key.split(".")[0] in _GROUPS}
    return {key: json.dumps(chosen[key]) for key in sorted(chosen)}


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
    paragraphs = [LOADING, f"```python\n{code}\n```"]
    if merged is not None:
        paragraphs.append(
            f"Merged in {merged['dtype']}. Logits differ from those of base and adapter by at most "
            f"{merged['difference']:.2g} of the largest; the most probable next token is the same for "
            f"{merged['num_same_next_token']} of {merged['num_tokens']} tokens."
        )
    elif not whole and not base["hub"] and not base["packed"]:
        paragraphs.append(
            f"BASE is a folder with `{base['model_name_or_path']}`, which is not on the Hub."
        )
    return "\n\n".join([before, *paragraphs, f"## {after}"])


def _whole_code(name: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    )


def _adapter_code(name: str, base: Mapping[str, Any]) -> str:
    """Return code that loads the base as in the training: at its commit, with its quantization."""
    quantization = base["quantization"]
    if base["packed"]:
        given = f'"{name}", subfolder="base"'
    elif base["hub"]:
        given = f'"{base["model_name_or_path"]}", revision="{base["revision"]}"'
    else:
        given = "BASE"
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer"
        + (", BitsAndBytesConfig" if quantization else ""),
        "",
    ]
    if quantization:
        words = ", ".join(f"{key}={value!r}" for key, value in quantization.items())
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
