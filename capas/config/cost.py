"""Estimate, before a run, what it costs here: download, disk, memory, and minutes of each stage.

capas check --cost                           the present conf/
capas check --cost experiment=NAME lora.r=8  another configuration, given as Hydra overrides
"""

import itertools
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capas.config.preflight import config_folder, of_training
from capas.core.dag import read_yaml
from capas.core.errors import CapasError, exit_on_user_error
from capas.core.params import Params
from capas.dataset.generated import EMBEDDED
from capas.dataset.preview import preview
from capas.dataset.references import read_messages
from capas.dataset.source import FORMATS
from capas.evaluation import answer_budget
from capas.evaluation.answer_length import with_room
from capas.evaluation.names import compares_labels, generates, needs_answers
from capas.hub.sources import Source, find_source, on_hub

SAMPLE = 200  # records whose tokens are counted
TOKENS_PER_MESSAGE = 6  # tokens that a template adds
CHARACTERS_PER_TOKEN = 3.5  # used if there is no tokenizer yet


def lines(params: Params, root: Path, splits: dict[str, int] | None) -> Iterator[str]:
    """Yield what a run costs, a line each.

    Args:
        splits: numbers of records in train, validation and test; None if the data is not here yet.

    Raises:
        CapasError: the model's config.json cannot be obtained, or its memory cannot be estimated.
    """
    from capas.config import duration
    from capas.models import hardware

    started = time.perf_counter()
    if params.hardware.device == "cpu":
        hardware.prepare(params.hardware)  # before torch is imported
    import transformers  # noqa: F401  every stage with a model imports it

    imports = time.perf_counter() - started
    folder = config_folder(params.model, root)
    yield from _disk(params, folder, root)
    need = of_training(params, folder)
    total = need.found.total + need.used_bytes
    here = "this machine has no such device" if need.free_bytes is None else (
        f"{_size(need.used_bytes + need.free_bytes)} available"
    )  # fmt: skip
    yield f"{'memory':12}at most {_size(total)}; {here}{'' if need.fits else ': it does not fit'}"
    if splits is None or not all(splits.values()):
        yield (
            f"{'time':12}unknown until the data is downloaded: run dvc repro fetch, then capas "
            "check --cost"
        )
        return
    if params.hardware.device != "cpu" and need.free_bytes is None:
        yield f"{'time':12}unknown: this machine has no GPU to measure on"
        return
    load = load_of(params, root, splits)
    speed = duration.measure(folder, params, load, imports)
    seconds = duration.stage_seconds(load, speed)
    minutes = sum(seconds.values()) / 60
    shown = ", ".join(f"{stage} {value / 60:.1f}" for stage, value in seconds.items())
    yield f"{'time':12}about {minutes:.0f} minutes ({shown}), measured on this machine"
    asked = f"answers of up to {load.limit} tokens"
    if load.num_labels:
        asked = f"test records with each of {load.num_labels} labels"
    yield (
        f"{'':12}{load.steps} steps of {load.batch} records, {load.length:.0f} tokens each on "
        f"average; {load.num_test} {asked}"
    )
    if minutes > duration.MINUTES_TO_ADVISE:
        for way in duration.advice(load, speed):
            yield f"{'':12}shorter: {way}"


def split_counts(dataset: Params, root: Path) -> dict[str, int] | None:
    """Return how many records fetch puts into each split, or None if the data is not on this machine.

    Raises:
        CapasError: a file cannot be read, or the records cannot be split as configured.
    """
    if dataset.path not in (*FORMATS, EMBEDDED):
        return None
    found = preview(dataset, root)
    if found.problem is not None:
        raise CapasError(found.problem)
    return found.splits


def _disk(params: Params, folder: Path, root: Path) -> Iterator[str]:
    """Yield the bytes to download and to store.

    DVC's cache holds the base model and the quantized one. A base from the Hub is in the Hub's cache too.
    """
    num_bytes = _stored_bytes(folder, params.model.trust_remote_code)
    hub = find_source(params.model.model_name_or_path, root) is Source.HUB
    if hub:
        yield f"{'download':12}{_size(num_bytes)}, minus what is already in the Hub's cache"
    quantization = params.quantization
    bits = 4.5 if quantization.load_in_4bit else 8.1 if quantization.load_in_8bit else 0
    total = int(num_bytes * (1 + hub) + num_bytes * bits / 16)
    free = shutil.disk_usage(root).free
    yield f"{'disk':12}about {_size(total)}; {_size(free)} are free{'' if total < free else ': too little'}"


def _stored_bytes(folder: Path, trust_remote_code: bool) -> int:
    """Return the bytes of the published weights, from their shapes and the dtype in config.json."""
    import torch
    from transformers import AutoModelForCausalLM

    from capas.training.activations import unquantized_config

    config = unquantized_config(folder, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    dtype = getattr(config, "dtype", None)
    width = (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize
    return sum(p.numel() for p in model.parameters()) * width


def load_of(params: Params, root: Path, splits: dict[str, int]) -> Any:
    """Return the work of the stages, from the numbers of records and the token counts of some of them."""
    from capas.config.duration import Load

    tokens = _token_counts(params, root)
    prompts, answers = [n for n, _ in tokens], [n for _, n in tokens]
    longest = max(answers)
    evaluation, generation, trainer = params.evaluation, params.generation, params.trainer
    settings = list(generation.settings.values())
    sequences = [generation.num_return_sequences if s.do_sample else 1 for s in settings]
    num_test = splits["test"]
    if evaluation.max_records is not None:
        num_test = min(num_test, evaluation.max_records)
    quantization = params.quantization
    length = min(params.dataset.max_length, statistics.fmean(p + a for p, a in tokens))
    prompt_length, limit = statistics.fmean(prompts), trainer.metric_max_new_tokens
    return Load(
        num_train=splits["train"],
        num_validation=splits["validation"],
        num_test=num_test,
        length=length,
        prompt_length=prompt_length,
        limit=evaluation.max_new_tokens or with_room(longest),
        longest=longest,
        train_batch=trainer.per_device_train_batch_size,
        accumulation=trainer.gradient_accumulation_steps,
        num_processes=params.hardware.num_processes,
        epochs=trainer.num_train_epochs,
        max_steps=trainer.max_steps,
        eval_steps=trainer.eval_steps,
        score_batch=evaluation.batch_size,
        generates=generates(evaluation.metrics),
        num_labels=_count_labels(params, root),
        quantizes=quantization.load_in_4bit or quantization.load_in_8bit,
        num_completions=generation.num_prompts * len(settings),
        num_sequences=max(1, round(statistics.fmean(sequences))),
        num_answered=_num_answered(
            params, splits, length, prompt_length, limit or with_room(longest)
        ),
        validation_batch=trainer.per_device_eval_batch_size,
    )


def _count_labels(params: Params, root: Path) -> int:
    """Return the number of labels that an evaluation compares, from some records if none are named."""
    if not compares_labels(params.evaluation.metrics):
        return 0
    if params.evaluation.labels is not None:
        return len(params.evaluation.labels)
    some = itertools.islice(read_messages(params.dataset, root), SAMPLE)
    return len({messages[-1]["content"].strip() for messages in some})


def _num_answered(
    params: Params, splits: dict[str, int], length: float, prompt_length: float, limit: int
) -> int:
    """Return the number of validation records that are answered at every evaluation of the training."""
    trainer, hardware = params.trainer, params.hardware
    if not needs_answers(trainer.metric_for_best_model):
        return 0
    if trainer.metric_records is not None:
        return min(trainer.metric_records, splits["validation"])
    size = trainer.per_device_eval_batch_size
    answers = answer_budget.Answers(prompt_length, limit, size, hardware.device)
    lengths, trains_all = [length] * splits["train"], params.lora.r is None
    work = answer_budget.work_between(lengths, trainer, hardware, trains_all)
    return answer_budget.choose_number(answers, work, splits["validation"], hardware.num_processes)


def _token_counts(params: Params, root: Path) -> list[tuple[int, int]]:
    """Return (prompt, answer) token counts of some records.

    Raises:
        CapasError: no record can be used.
    """
    count = _counter(params.model, root)
    found = []
    for messages in itertools.islice(read_messages(params.dataset, root), SAMPLE):
        lengths = [count(m["content"]) + TOKENS_PER_MESSAGE for m in messages]
        found.append((sum(lengths[:-1]), lengths[-1]))
    if not found:
        raise CapasError("no record can be used, so the time cannot be estimated")
    return found


def _counter(model: Params, root: Path) -> Any:
    """Return a function that counts tokens; it estimates from characters if there is no tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        if find_source(model.model_name_or_path, root) is Source.HUB:
            repository = on_hub(model.model_name_or_path)
            folder = repository.download(model.revision or "main", ("tokenizer.json",))
        else:
            folder = root / model.model_name_or_path
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # noqa: BLE001  tokenizers raises nothing more specific; the count is less exact
        return lambda text: round(len(text) / CHARACTERS_PER_TOKEN)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _size(num_bytes: int) -> str:
    from capas.training.memory import show

    return show(num_bytes)


def main() -> None:
    """Print what params.yaml costs; exit with code 1 and a message if it cannot be estimated."""
    with exit_on_user_error("cost"):
        root = Path.cwd()
        params = Params(read_yaml(root / "params.yaml"))
        for line in lines(params, root, split_counts(params.dataset, root)):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
