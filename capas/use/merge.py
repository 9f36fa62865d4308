"""Merge the adapter into its base: one model in full precision, in safetensors.

    capas merge FOLDER                     the workspace's result
    capas merge FOLDER --run RUN           an MLflow run: run id or its beginning, name, DVC experiment
    capas merge FOLDER --dtype bfloat16    a precision other than that of the training

A quantized base is dequantized first, and the adapter is added to these weights, with which it was trained.
(Adding it to the full-precision base gives a different model.) The merged model is then loaded with
transformers alone, and its logits are compared with those of base and adapter on prompts of the test split.
FOLDER is only written if the largest difference is within the tolerance and less than half of the
adapter's own effect.

FOLDER holds config.json, weights, tokenizer, chat template, generation_config.json, and merge.json
with the comparison. `AutoModelForCausalLM.from_pretrained(FOLDER)` needs nothing else; git ignores it.

Exit code: 0 merged, 1 refused (the difference is printed), 2 failed, 130 stopped.
"""

import argparse
import copy
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.core.errors import CapasError
from capas.core.files import write_json
from capas.models import tuned_weights
from capas.use import tuned_model
from capas.use.tuned_model import Tuned

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")
# How far logits may move when every weight is rounded to this precision, as a fraction of the largest
# logit (measured: tests/use/test_merge.py).
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
INT8_TOLERANCE = 1e-1  # int8 layers also round their activations; a merged layer does not
NUM_NEW_TOKENS = 32  # length of each compared answer
_OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to create")
    tuned_model.add_arguments(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision of the merged model (default: as in training)"
    )
    parser.add_argument(
        "--tolerance",
        type=tuned_model.bounded(float, 0, sys.float_info.max),
        metavar="X",
        help="largest allowed logit difference, relative to the largest logit (default: "
        + ", ".join(f"{t:g} for {name}" for name, t in TOLERANCE.items())
        + f"; {INT8_TOLERANCE:g} for an int8 base)",
    )


def command(options: argparse.Namespace) -> int:
    """Return the exit code: 0, or 1 if the merged model differs.

    Raises:
        CapasError: the folder exists, or there is no adapter to merge.
    """
    if options.folder.exists():
        raise CapasError(f"{options.folder} already exists; name a new folder")
    partial = options.folder.with_name(f".{options.folder.name}.partial")
    with tuned_model.tuned(Path.cwd(), options.run) as source:
        check_is_adapter(source)
        try:
            facts = merge(source, partial, options.dtype, options.tolerance)
            tuned_model.say(describe(facts))
            if not facts["difference"] <= facts["tolerance"]:
                rounded = (
                    ""
                    if facts["dtype"] == "float32"
                    else "; try --dtype float32, which rounds less"
                )
                tuned_model.say(
                    f"capas: {options.folder} was not written: the merged model differs from "
                    f"base + adapter{rounded}"
                )
                return 1
            partial.rename(options.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    tuned_model.say(f"{options.folder}: merged model of {source.name}")
    return 0


def check_is_adapter(source: Tuned) -> None:
    """Check that the model is an adapter.

    Raises:
        CapasError: all weights were trained, so there is nothing to merge.
    """
    if not tuned_weights.is_adapter(source.folder / "adapter"):
        where = (
            tuned_weights.FOLDER
            if source.run_id is None
            else f"the artifact adapter of {source.name}"
        )
        raise CapasError(
            f"{source.name} is a whole model, there is nothing to merge. Load it with "
            f"AutoModelForCausalLM.from_pretrained: {where}"
        )


def merge(
    source: Tuned, folder: Path, dtype: str | None = None, tolerance: float | None = None
) -> dict[str, Any]:
    """Write the merged model to `folder`, load it again and compare.

    Returns:
        The facts of merge.json: dtype; difference, tolerance and the adapter's own effect, as fractions of
        the largest logit; max_logit; the number of tokens compared, and the number of tokens with the same
        most probable next token.

    Raises:
        CapasError: the model cannot be loaded, or a merged weight is not finite.
    """
    import torch

    from capas.models.loading import quantization_method, save_model
    from capas.use.served_model import Served

    served = Served(source.folder)
    chosen = dtype or served.facts["model"]["dtype"]
    allowed = max(TOLERANCE[chosen], INT8_TOLERANCE * (quantization_method(served.model) == "int8"))
    ids = list(conversations(served, source.prompts))
    expected = [logits(served.model, row) for row in ids]
    with served.model.disable_adapter():
        changed = difference((logits(served.model, row) for row in ids), expected)
    allowed = min(allowed, changed / 2)  # closer to the adapted model than to its base
    trusted = served.facts["model"]["trust_remote_code"]
    plain = merged(served.model, getattr(torch, chosen), trusted)
    shutil.rmtree(folder, ignore_errors=True)
    save_model(plain, folder)
    for file in sorted((source.folder / "adapter").iterdir()):
        if file.name not in _OF_ADAPTER:
            shutil.copyfile(file, folder / file.name)
    # Lineage and experiments record every file that git does not ignore.
    (folder / ".gitignore").write_text("*\n")
    del served, plain
    facts = {
        "adapter_sha256": tuned_weights.sha256(source.folder / "adapter"),
        "dtype": chosen,
        **compare(folder, chosen, trusted, ids, expected),
        "adapter_difference": changed,
        "tolerance": allowed if tolerance is None else tolerance,
    }
    write_json(folder / "merge.json", facts)
    return facts


def conversations(served: Any, prompts: list[list[dict[str, Any]]]) -> Iterator[list[int]]:
    """Yield the ids of every prompt with the tuned model's own answer."""
    from capas.evaluation.generation import complete, generation_config

    config = generation_config(served.chat, NUM_NEW_TOKENS)
    prompt_ids = [served.format.prompt_ids(messages, served.tools) for messages in prompts]
    answers = complete(served.model, prompt_ids, config, batch_size=1)
    for prompt, (answer,) in zip(prompt_ids, answers, strict=True):
        yield [*prompt, *answer.input_ids]


def logits(model: Any, ids: list[int]) -> "torch.Tensor":
    """Return the logits, float32 [tokens, vocabulary]."""
    import torch

    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([ids], device=model.device)).logits[0]
    return found.float().cpu()


def merged(model: Any, dtype: "torch.dtype", trusted: bool) -> "PreTrainedModel":
    """Return the base of a `PeftModel` with the adapter merged into its weights; this destroys `model`.

    Each layer is dequantized and merged in float32, rounded once, and kept in main memory. A GPU thus holds
    the quantized model and a single layer in float32.

    Raises:
        CapasError: a merged weight is not finite.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from torch import nn
    from transformers import AutoModelForCausalLM

    from capas.models.coverage import quantized_linears

    adapter, base = model.peft_config["default"], model.get_base_model()
    for name in [name for name, m in base.named_modules() if isinstance(m, LoraLayer)]:
        layer = _merge_layer(name, base.get_submodule(name), adapter)
        base.set_submodule(name, layer.to("cpu", dtype))
    for name in [name for name, _ in quantized_linears(base)]:
        base.set_submodule(name, _plain(base.get_submodule(name)).to("cpu", dtype))
    # transformers' own `to` refuses a model that was quantized
    weights = nn.Module.to(base, "cpu", dtype).state_dict()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trusted
        )
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain


def _merge_layer(name: str, layer: Any, config: Any) -> "nn.Module":
    """Merge a layer as PEFT does for its variant of LoRA."""
    from peft import inject_adapter_in_model
    from torch import nn

    plain = _plain(layer.get_base_layer())
    alone = copy.copy(config)
    alone.target_modules, alone.exclude_modules, alone.inference_mode = ["layer"], None, True
    alone.layers_to_transform, alone.rank_pattern, alone.alpha_pattern = None, {}, {}
    alone.r, alone.lora_alpha = layer.r["default"], layer.lora_alpha["default"]
    holder = inject_adapter_in_model(alone, nn.ModuleDict({"layer": plain}))
    lora = holder["layer"]
    own = {k: v.float() for k, v in layer.state_dict().items() if not k.startswith("base_layer.")}
    missing = lora.load_state_dict(own, strict=False).missing_keys
    if any(not key.startswith("base_layer.") for key in missing):
        raise CapasError(f"{name}: the adapter lacks weights that PEFT expects: {missing}")
    try:
        lora.merge(safe_merge=True)
    except ValueError as error:  # not finite
        raise CapasError(f"{name} cannot be merged: {error}") from None
    result: nn.Module = lora.get_base_layer()
    return result


def _plain(layer: Any) -> "nn.Module":
    """Return a copy of a layer in float32, dequantized if bitsandbytes quantized it."""
    import torch
    from torch import nn

    from capas.models.loading import dequantize

    if type(layer).__name__ not in ("Linear4bit", "Linear8bitLt"):
        return copy.deepcopy(layer).float()
    if layer.weight.dtype == torch.int8 and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB  # a forward pass has moved it there
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
    plain.weight = nn.Parameter(dequantize(layer).to(torch.float32), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return plain


def compare(
    folder: Path, dtype: str, trusted: bool, ids: list[list[int]], expected: list["torch.Tensor"]
) -> dict[str, Any]:
    """Compare the model in `folder`, loaded with transformers alone, with the logits `expected`.

    Raises:
        CapasError: weights are missing or unexpected, or a logit is not finite.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trusted, output_loading_info=True
    )
    if lost := sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]])):
        raise CapasError(
            f"{folder} is incomplete: missing or unexpected weights {', '.join(lost[:4])}"
        )
    model.eval()
    same = 0

    def answers() -> "Iterator[torch.Tensor]":
        """Yield the logits one prompt at a time: those of a long prompt take gigabytes."""
        nonlocal same
        for row, wanted in zip(ids, expected, strict=True):
            found = logits(model, row)
            _check_finite(found, dtype)
            same += int((found.argmax(dim=-1) == wanted.argmax(dim=-1)).sum())
            yield found

    return {
        "max_logit": max(float(row.abs().max()) for row in expected),
        "difference": difference(answers(), expected),
        "num_tokens": sum(len(row) for row in ids),
        "num_same_next_token": same,
    }


def _check_finite(found: "torch.Tensor", dtype: str) -> None:
    if not bool(found.isfinite().all()):
        raise CapasError(
            f"the merged model has NaN or infinite logits in {dtype}"
            + (", which overflows above 65,504. Use --dtype bfloat16" if dtype == "float16" else "")
        )


def difference(found: Iterable["torch.Tensor"], expected: list["torch.Tensor"]) -> float:
    """Return the largest difference as a fraction of the largest logit; NaN if any logit is NaN."""
    import torch

    largest = torch.stack([row.abs().max() for row in expected]).max()
    pairs = zip(found, expected, strict=True)
    return float(torch.stack([(row - wanted).abs().max() for row, wanted in pairs]).max() / largest)


def describe(facts: dict[str, Any]) -> str:
    largest = facts["difference"] * facts["max_logit"]
    return (
        f"largest logit difference: {largest:.3g}, relative {facts['difference']:.3g} (tolerance "
        f"for {facts['dtype']}: {facts['tolerance']:.3g}; the adapter changes "
        f"{facts['adapter_difference']:.3g}); the most probable next token is the same for "
        f"{facts['num_same_next_token']} of {facts['num_tokens']} tokens"
    )
