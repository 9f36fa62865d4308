"""Quantize the base model and measure what every layer lost.

Reads   data/models/base
Writes  data/models/quantized, reports/quantization.json, reports/quantization_error.csv
Params  hardware, model.dtype, model.trust_remote_code, quantization

Embeddings, norms and the head stay as they are; every other linear layer keeps 4 or 8 bits a weight:

    before  model.layers.0.mlp.up_proj.weight  float32 [320, 128]  -0.0213 0.0874 ...
    after   the same weight, NF4: one of 16 levels each, times the largest of its block of 64 weights
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas import hardware
from capas.facts import read_json, write_csv, write_json
from capas.links import place
from capas.params import Params
from capas.stage import Stage, log, run

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

BASE, QUANTIZED = "data/models/base", "data/models/quantized"
HEADLINE = ("bytes_before", "bytes_after", "relative_error_mean")


def main(params: Params, stage: Stage) -> None:
    device = hardware.prepare(params.hardware)  # before torch is imported
    from transformers import BitsAndBytesConfig

    from capas.model import load_model, quantization_method

    asked, base = params.quantization.without("preset"), stage.dep(BASE)
    quantize = asked["load_in_4bit"] or asked["load_in_8bit"]
    model = load_model(
        base,
        params.model,
        device,
        quantization_config=BitsAndBytesConfig(**asked) if quantize else None,
    )
    folder = stage.out(QUANTIZED)
    save(model, base, folder)

    errors = list(layer_errors(model, base, params)) if quantize else []
    facts = {
        "method": quantization_method(model),
        **sizes(model, base, folder),
        **spread([row["relative_error"] for row in errors]),
        "skipped_modules": skipped_modules(model),
    }
    write_json(stage.out("reports/quantization.json"), facts)
    write_json(stage.out("reports/metrics/quantize.json"), {name: facts[name] for name in HEADLINE})
    write_csv(
        stage.out("reports/quantization_error.csv"), ("layer", "relative_error", "bits"), errors
    )
    log.info("%s: %d -> %d bytes", facts["method"], facts["bytes_before"], facts["bytes_after"])


def save(model: "PreTrainedModel", base: Path, folder: Path) -> None:
    """As safetensors. A base that is neither quantized nor converted is not written a second time."""
    config = read_json(base / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")  # the older name
    if getattr(model, "quantization_method", None) is None and f"torch.{stored}" == str(
        model.dtype
    ):
        folder.mkdir()
        for file in sorted(base.iterdir()):
            place(file, folder / file.name)
    else:
        model.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read


def layer_errors(model: "PreTrainedModel", base: Path, params: Params) -> Iterator[dict[str, Any]]:
    """Per layer: Frobenius norm of quantized - original over that of the original; bits a weight takes."""
    import torch

    from capas.model import dequantize, load_model, quantized_linears

    originals = load_model(base, params.model, torch.device("cpu"))
    state = model.state_dict()
    for name, layer in quantized_linears(model):
        original = original_weight(originals.get_submodule(name)).float()
        difference = dequantize(layer).cpu() - original
        num_bytes = sum(
            v.nbytes for k, v in state.items() if k.startswith(f"{name}.") and k != f"{name}.bias"
        )
        yield {
            "layer": name,
            "relative_error": (difference.norm() / original.norm()).item(),
            "bits": 8 * num_bytes / original.numel(),
        }


def original_weight(layer: "nn.Module") -> Any:
    """[out, in]; GPT-2's Conv1D keeps its weight the other way round."""
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight


def sizes(model: "PreTrainedModel", base: Path, folder: Path) -> dict[str, int]:
    from capas.model import quantized_linears

    return {
        "num_parameters": model.num_parameters(),
        "num_quantized_parameters": sum(
            m.in_features * m.out_features for _, m in quantized_linears(model)
        ),
        "bytes_before": weight_bytes(base),
        "bytes_after": weight_bytes(folder),
    }


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def spread(errors: list[float]) -> dict[str, float]:
    """Zero where nothing was quantized."""
    mean = sum(errors) / len(errors) if errors else 0.0
    return {"relative_error_mean": mean, "relative_error_max": max(errors, default=0.0)}


def skipped_modules(model: "PreTrainedModel") -> list[str]:
    """Linear layers left in full precision; the embeddings always are."""
    from torch import nn

    from capas.model import quantized_linears

    quantized = {name for name, _ in quantized_linears(model)}
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in quantized]


if __name__ == "__main__":
    run("quantize", main)
