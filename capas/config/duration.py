"""Estimate how long the stages of a configuration take on this machine, from a few measured steps.

Two models with one and with three layers, random weights and the real model's shapes are trained and
queried briefly; the time per layer is multiplied by the number of layers. No weights are needed.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.core.params import Params

LAYERS = (1, 3)
LOADING = ("attn_implementation", "dtype", "trust_remote_code")  # keys for loading a model
REPEATS = 3
NEW_TOKENS = 8  # tokens generated to time one
READ_BYTES_PER_SECOND = 2**29  # for weights, from a disk or the page cache
GENERAL_RECORDS, GENERAL_LENGTH = 40, 40  # records of data/general, and tokens in each
MINUTES_TO_ADVISE = 60


@dataclass(frozen=True)
class Load:
    """The work of the stages. Lengths are mean tokens; `limit` and `longest` are tokens of an answer.

    `num_answered` validation records are answered at each evaluation of the training, `validation_batch` of
    them at once.
    """

    num_train: int
    num_validation: int
    num_test: int
    length: float
    prompt_length: float
    limit: int
    longest: int
    train_batch: int
    accumulation: int
    num_processes: int
    epochs: float
    max_steps: int
    eval_steps: int
    score_batch: int
    generates: bool
    num_labels: int  # whose likelihoods are compared; 0 if none are
    quantizes: bool
    num_completions: int  # calls of the sample stage for each model
    num_sequences: int
    num_answered: int
    validation_batch: int

    @property
    def steps(self) -> int:
        """The optimizer steps of the training."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, round(math.ceil(self.num_train / self.batch) * self.epochs))

    @property
    def batch(self) -> int:
        """The records in a step, of all processes together."""
        return self.train_batch * self.accumulation * self.num_processes


@dataclass(frozen=True)
class Speed:
    """Measured seconds; names with `tuned_` are those of the model with its adapter.

    Attributes:
        train_batch: a training batch.
        score: a scored record.
        answer: a token of a batch of answers in the evaluation.
        labels: all labels after a record's prompt; 0.0 if none are compared.
        sample: a token of the samples.
        start: the start of a stage: imports, loading the model.
    """

    train_batch: float
    score: float
    tuned_score: float
    answer: float
    tuned_answer: float
    labels: float
    tuned_labels: float
    sample: float
    tuned_sample: float
    start: float
    weight_bytes: int


def stage_seconds(load: Load, speed: Speed) -> dict[str, float]:
    """Return the seconds of each stage that takes long."""
    start, num_batches = speed.start, math.ceil(load.num_test / load.score_batch)
    base = tuned = 0.0
    if load.num_labels:
        base, tuned = load.num_test * speed.labels, load.num_test * speed.tuned_labels
    if load.generates:
        base += num_batches * speed.answer * load.limit
        tuned += num_batches * speed.tuned_answer * load.longest
    validations = 2 + load.steps / load.eval_steps
    answered = (
        math.ceil(load.num_answered / load.validation_batch) * speed.tuned_answer * load.limit
    )
    general = GENERAL_RECORDS * min(1.0, GENERAL_LENGTH / load.length)
    reading = speed.weight_bytes / READ_BYTES_PER_SECOND
    return {
        "quantize": start + (2 * reading if load.quantizes else 0.0),
        "evaluate_base": start + (1 + load.quantizes) * load.num_test * speed.score + base,
        "train": start
        + load.steps * load.accumulation * speed.train_batch
        + validations * (load.num_validation * speed.tuned_score + answered),
        "evaluate": start
        + load.num_test * speed.tuned_score
        + tuned
        + general * (speed.score + speed.tuned_score),
        "sample": start + load.num_completions * load.limit * (speed.sample + speed.tuned_sample),
    }


def advice(load: Load, speed: Speed) -> list[str]:
    """Return the two settings that save most time, with the total minutes for each."""
    ways = {
        "trainer.num_train_epochs=1": replace(load, epochs=1.0),
        f"dataset.max_records={(load.num_train + load.num_validation + load.num_test) // 2}": replace(
            load,
            num_train=load.num_train // 2,
            num_validation=load.num_validation // 2,
            num_test=load.num_test // 2,
        ),
        "evaluation.max_records=50": replace(load, num_test=min(50, load.num_test)),
        "evaluation=loss": replace(load, generates=False, num_labels=0),
        "generation=greedy generation.num_prompts=3": replace(load, num_completions=3),
    }
    totals = {way: sum(stage_seconds(less, speed).values()) for way, less in ways.items()}
    now = sum(stage_seconds(load, speed).values())
    best = sorted(totals, key=lambda way: totals[way])[:2]
    return [
        f"{way}: about {totals[way] / 60:.0f} minutes" for way in best if totals[way] < 0.95 * now
    ]


def measure(folder: Path, params: Params, load: Load, imports: float) -> Speed:
    """Time training and answers of the model whose config.json is in `folder`.

    Args:
        params: the whole configuration; on a CPU, call `capas.models.hardware.prepare` first.
        imports: seconds that a stage takes to import its libraries.
    """
    import torch

    from capas.models.loading import load_model
    from capas.training.activations import unquantized_config
    from capas.training.lora import trains_all

    device = torch.device(params.hardware.device)
    config = unquantized_config(folder, params.model.trust_remote_code)
    num_layers = config.get_text_config().num_hidden_layers
    how_loaded = {key: params.model[key] for key in LOADING}
    times: list[dict[str, float]] = []
    for layers in LAYERS:
        with _small(config, layers, params) as (small, how):
            model = load_model(small, Params(how_loaded), device, **how)
            times.append(_timed(model, params, load, trains_all(params.lora)))
    one, three = times
    step = (num_layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    whole = {name: one[name] + step * max(0.0, three[name] - one[name]) for name in one}
    num_bytes = int(whole.pop("bytes"))
    return Speed(**whole, start=imports + num_bytes / READ_BYTES_PER_SECOND, weight_bytes=num_bytes)


@contextmanager
def _small(config: Any, layers: int, params: Params) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a folder with a random model of `layers` layers, and how the stage quantize loads it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    quantization = params.quantization.without("preset")
    quantizes = quantization["load_in_4bit"] or quantization["load_in_8bit"]
    with TemporaryDirectory(prefix="capas-duration-") as name:
        AutoModelForCausalLM.from_config(small).save_pretrained(name)
        yield (
            Path(name),
            {"quantization_config": BitsAndBytesConfig(**quantization)} if quantizes else {},
        )


def _timed(model: Any, params: Params, load: Load, trains_all: bool) -> dict[str, float]:
    """Return the seconds of each step, and the bytes of the weights."""
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    base = _answering(model, load)
    tuned = model if trains_all else _with_adapter(model, params)
    found = {**base, **{f"tuned_{name}": value for name, value in _answering(tuned, load).items()}}
    training = _training(tuned, params, _ids(tuned, load.train_batch, load.length), trains_all)
    return {**found, "train_batch": _seconds(training), "bytes": float(num_bytes)}


def _with_adapter(model: Any, params: Params) -> Any:
    from peft import get_peft_model

    from capas.training.lora import make_config

    return get_peft_model(model, make_config(params.lora)).eval()


def _ids(model: Any, rows: int, tokens: float) -> Any:
    import torch

    vocab_size = model.config.get_text_config().vocab_size
    shape = rows, max(2, round(tokens))
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def _answering(model: Any, load: Load) -> dict[str, float]:
    """Return the seconds of a scored record, of its labels, and of a token of a batch of answers."""
    import torch
    from transformers import GenerationConfig

    from capas.evaluation.label_batches import score_labels

    rows = min(4, load.score_batch)
    scored = _ids(model, rows, load.length)

    def score() -> None:
        with torch.inference_mode():
            model(scored)

    def answer(rows: int) -> float:
        prompt = _ids(model, rows, load.prompt_length)

        def write(tokens: int) -> float:
            config = GenerationConfig(
                max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
            with torch.inference_mode():
                return _seconds(lambda: model.generate(prompt, generation_config=config), 2)

        return max(0.0, write(1 + NEW_TOKENS) - write(1)) / NEW_TOKENS

    def compare_labels() -> None:
        prompt = _ids(model, 1, load.prompt_length)[0].tolist()
        ending = _ids(model, 1, load.longest)[0].tolist()
        endings = [(ending, ending)] * load.num_labels
        score_labels(model, [{"prompt_ids": prompt}], endings, 0, load.score_batch)

    batch = min(load.score_batch, max(1, load.num_test))
    return {
        "labels": _seconds(compare_labels) if load.num_labels else 0.0,
        "score": _seconds(score) / rows,
        "answer": answer(batch),
        "sample": answer(load.num_sequences),
    }


def _training(model: Any, params: Params, ids: Any, trains_all: bool) -> Callable[[], None]:
    """Return a function that runs a forward and a backward pass like the training."""
    import torch

    trainer = params.trainer
    if trains_all:
        model.requires_grad_(True)
    if trainer.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=trainer.bf16)

    def step() -> None:
        with autocast:
            model(ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def _seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the median seconds of some runs, after one run to warm up."""
    import torch

    found = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])
