"""Quantize the base model and measure the error of every layer.

Reads   data/models/base
Writes  data/models/quantized, reports/quantization.json, reports/quantization_error.csv
Params  hardware, model.dtype, model.trust_remote_code, quantization

Embeddings, norms and the head (lm_head, tied to the embeddings or not) stay as they are; every other linear
layer keeps 4 or 8 bits per weight:

    before  model.layers.0.mlp.up_proj.weight  float32 [320, 128]  -0.0213 0.0874 ...
    after   the same weight, NF4: one of 16 levels each, times the largest of its block of 64 weights

Weights are read one at a time from mapped files, whose pages the system may reclaim, so that no whole model
in full precision is in memory beside the quantized one (benchmarks/quantize_memory.py). A model already
quantized with bitsandbytes is passed on as it is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core.files import read_json, write_csv, write_json
from capas.core.links import place
from capas.core.params import Params
from capas.core.stage import Stage, log, run
from capas.models import hardware
from capas.models.architecture import check_stored_quantization, stored_quantization
from capas.models.weights import num_shards, read_weights, weight_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BASE, QUANTIZED = "data/models/base", "data/models/quantized"
HEADLINE = ("bytes_before", "bytes_after", "relative_error_mean")


def main(params: Params, stage: Stage) -> None:
    device = hardware.prepare(params.hardware)  # before torch is imported
    stage.costs |= hardware.machine()
    from transformers import BitsAndBytesConfig

    from capas.models.loading import load_model, quantization_method

    asked, base = params.quantization.without("preset"), stage.dep(BASE)
    stored = stored_quantization(read_json(base / "config.json"), BASE)
    if stored:
        check_stored_quantization(stored, asked, BASE)
    quantize = not stored and (asked["load_in_4bit"] or asked["load_in_8bit"])
    how = {"quantization_config": BitsAndBytesConfig(**asked)} if quantize else {}
    model = load_model(base, params.model, device, **how)
    folder = stage.out(QUANTIZED)
    save(model, base, folder, as_it_is=stored is not None)

    errors = layer_errors(model, base, params) if quantize else []
    facts = {
        "method": quantization_method(model),
        "came_quantized": stored is not None,
        **sizes(model, base, folder),
        **spread([row["relative_error"] for row in errors]),
        **full_precision(model),
    }
    write_json(stage.out("reports/quantization.json"), facts)
    write_json(stage.out("reports/metrics/quantize.json"), {name: facts[name] for name in HEADLINE})
    write_csv(
        stage.out("reports/quantization_error.csv"), ("layer", "relative_error", "bits"), errors
    )
    log.info("%s: %d -> %d bytes", facts["method"], facts["bytes_before"], facts["bytes_after"])


def save(model: "PreTrainedModel", base: Path, folder: Path, as_it_is: bool) -> None:
    """Save the model as safetensors; files of a base that is neither quantized nor converted are reused."""
    from capas.models.loading import save_model

    config = read_json(base / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")  # its older name
    quantized = getattr(model, "quantization_method", None) is not None
    if as_it_is or (not quantized and f"torch.{stored}" == str(model.dtype)):
        folder.mkdir()
        for file in sorted(base.iterdir()):
            place(file, folder / file.name)
    else:
        save_model(model, folder)


def layer_errors(model: "PreTrainedModel", base: Path, params: Params) -> list[dict[str, Any]]:
    """Return a row for each layer: its relative error, and the bits that a weight takes.

    The error is the Frobenius norm of quantized - original, divided by that of the original.
    """
    from capas.models.coverage import quantized_linears
    from capas.models.loading import dequantize

    layers, state, found = dict(quantized_linears(model)), model.state_dict(), {}
    for name, original in originals(layers, base, params):
        weight = original_weight(original, layers[name]).float()
        difference = dequantize(layers[name]).cpu().sub_(weight)
        num_bytes = sum(
            v.nbytes for k, v in state.items() if k.startswith(f"{name}.") and k != f"{name}.bias"
        )
        found[name] = {
            "layer": name,
            "relative_error": (difference.norm() / weight.norm()).item(),
            "bits": 8 * num_bytes / weight.numel(),
        }
    return [found[name] for name in layers]


def originals(
    layers: dict[str, Any], base: Path, params: Params
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield (name, original weight) of every layer; load the model for names that differ on disk."""
    import torch

    from capas.models.loading import load_model

    read = set()
    for name, weight in read_weights(base, list(layers)):
        read.add(name)
        yield name, weight
    if left := [name for name in layers if name not in read]:
        log.info("%d weights have different names on disk: loading the model again", len(left))
        model = load_model(base, params.model, torch.device("cpu"))
        yield from ((name, model.get_submodule(name).weight) for name in left)


def original_weight(weight: "torch.Tensor", layer: Any) -> "torch.Tensor":
    """Return the weight as [out, in]; GPT-2's Conv1D stores it transposed."""
    return weight.T if layer.source_cls.__name__ == "Conv1D" else weight


def sizes(model: "PreTrainedModel", base: Path, folder: Path) -> dict[str, int]:
    from capas.models.coverage import quantized_linears

    return {
        "num_parameters": model.num_parameters(),
        "num_quantized_parameters": sum(
            m.in_features * m.out_features for _, m in quantized_linears(model)
        ),
        "bytes_before": weight_bytes(base),
        "bytes_after": weight_bytes(folder),
        "num_shards_before": num_shards(base),
        "num_shards_after": num_shards(folder),
    }


def spread(errors: list[float]) -> dict[str, float]:
    """Return mean and maximum of the errors, zero if nothing was quantized."""
    mean = sum(errors) / len(errors) if errors else 0.0
    return {"relative_error_mean": mean, "relative_error_max": max(errors, default=0.0)}


def full_precision(model: "PreTrainedModel") -> dict[str, Any]:
    """Return what keeps its precision: linear layers by name, embeddings and head, tied or not."""
    from torch import nn

    from capas.models.coverage import quantized_linears

    quantized = {name for name, _ in quantized_linears(model)}
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {
        "skipped_modules": [name for name in linears if name not in quantized],
        "embeddings_dtype": str(embeddings.dtype).removeprefix("torch."),
        "head_dtype": str(head.dtype).removeprefix("torch."),
        "tied_embeddings": head is embeddings,
    }


if __name__ == "__main__":
    run("quantize", main)
