"""Save the tuned model as an MLflow model: a folder from which `capas.use.served_model` answers prompts.

The same result gives the same bytes: MLflow's random id and time of writing are replaced by the training's
key and the run's start.
"""

import datetime
import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from capas.chat.messages import conversation
from capas.core.code_digests import CodeReader
from capas.core.dag import read_yaml
from capas.core.files import read_json, write_json
from capas.core.params import Params
from capas.core.records import RAW, TEXT, read_records
from capas.core.stage import Stage
from capas.evaluation.prompts import DEFAULT_NEW_TOKENS, first_system_message
from capas.hub.sources import Source, find_source
from capas.use import served_model

MAX_PACKED_BYTES = 16 * 2**20  # a larger base is only named, not copied into every run
ADAPTER, QUANTIZED = "data/models/adapter", "data/models/quantized"
LOADER = served_model.__name__
ANSWERING = f"{LOADER.replace('.', '/')}.py"
# Packages that answering needs; those of the report and of the fetch stages are left out.
_PINNED = (
    *("accelerate", "bitsandbytes", "jinja2", "numpy", "peft", "pyarrow"),
    *("safetensors", "tokenizers", "torch", "transformers"),
)
_OF_MODEL = ("attn_implementation", "dtype", "trust_remote_code")  # keys that loading reads
_OF_HARDWARE = (
    *("allow_tf32", "cudnn_benchmark", "cudnn_deterministic"),
    *("device", "instruction_set", "num_threads"),
)
_OTHERS = ("huggingface-hub", "mlflow", "orjson", "pandas", "pyyaml")


def write_data(folder: Path, card: str, facts: Mapping[str, Any], stage: Stage) -> None:
    """Write the folder that `capas.use.served_model.Served` reads."""
    folder.mkdir(parents=True)
    _copy(stage.dep(ADAPTER), folder / "adapter")
    (folder / "adapter/README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(stage.dep("data/formatted") / "chat.json", folder / "chat.json")
    if facts["base"]["packed"]:
        _copy(stage.dep(QUANTIZED), folder / "base")
    write_json(folder / "served.json", facts)


def served_facts(params: Params, root: Path, find: Callable[[str], Path]) -> dict[str, Any]:
    """Return how the model was evaluated, and the system message and tools for a bare prompt.

    Args:
        params: those of params.yaml, or the part of them that publish declares.
        root: the repository.
        find: return where an output of a stage lies: `Stage.dep`, which checks that it is declared.
    """
    records = read_records(find("data/raw") / "test.parquet", RAW)
    record, system = next(records), params.generation.system
    measured = read_json(find("reports/evaluation.json"))["tuned"]
    packed = num_bytes(find(QUANTIZED)) <= MAX_PACKED_BYTES
    model, quantization = params.model, params.quantization.without("preset")
    own = read_json(find("reports/quantization.json"))
    quantized_here = own["method"] != "none" and not own["came_quantized"]
    name = model.model_name_or_path
    return {
        "base": {
            "packed": packed,
            "model_name_or_path": name,
            "revision": model.revision,
            "licence": model.licence,
            "hub": find_source(name, root) is Source.HUB,
            "trust_remote_code": model.trust_remote_code,
            "quantization": quantization if quantized_here and not packed else None,
        },
        "model": {key: model[key] for key in _OF_MODEL},
        "hardware": {key: params.hardware[key] for key in _OF_HARDWARE},
        "max_new_tokens": measured["max_new_tokens"] or DEFAULT_NEW_TOKENS,
        "batch_size": params.evaluation.batch_size,
        "system": first_system_message(record) if system is None else system,
        "tools": conversation(record)[1],
        "multi_turn": any(map(_has_turns, chain([record], records))),
        "role": TEXT if record["messages"][0]["role"] == TEXT else "user",
    }


def save_model(
    folder: Path, data: Path, key: str, run: Any, stage: Stage, facts: Mapping[str, Any]
) -> None:
    """Save `data` as an MLflow model, with the modules of capas that it needs."""
    import mlflow.pyfunc
    from mlflow.models import Model

    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    written = datetime.datetime.fromtimestamp(run.start_time / 1000, datetime.UTC)
    code = folder.with_name("code")
    copy_code(code, stage)
    mlflow.pyfunc.save_model(
        path=str(folder),
        loader_module=LOADER,
        data_path=str(data),
        code_paths=[str(code / "capas")],
        mlflow_model=Model(
            artifact_path="model",
            run_id=run.id,
            utc_time_created=written.strftime("%Y-%m-%d %H:%M:%S.%f"),
            model_uuid=hashlib.sha256(key.encode()).hexdigest()[:32],
        ),
        signature=signature(facts),
        input_example=example(stage),
        pip_requirements=requirements(read_yaml(stage.root / "environment.yaml")),
    )
    shutil.copyfile(data / "adapter/README.md", folder / "README.md")


def signature(facts: Mapping[str, Any]) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    inputs = [
        ColSpec(DataType.string, "prompt", required=False),
        ColSpec(AnyType(), "messages", required=False),
        ColSpec(AnyType(), "tools", required=False),
    ]
    return ModelSignature(
        Schema(inputs),
        Schema([ColSpec(DataType.string, "completion")]),
        ParamSchema(
            [
                ParamSpec(name, DataType.long, facts[name])
                for name in ("max_new_tokens", "batch_size")
            ]
        ),
    )


def example(stage: Stage) -> Any:
    """Return an example request from the test split."""
    import pandas as pd

    record = next(iter(read_records(stage.dep("data/raw") / "test.parquet", RAW)))
    question = next(m for m in record["messages"] if m["role"] in ("user", TEXT))
    return pd.DataFrame({"prompt": [question["content"]]})


def requirements(environment: Mapping[str, str]) -> list[str]:
    """Return the versions with which the stages ran."""
    pins = {name: environment[name] for name in _PINNED}
    pins |= {name: version(name) for name in _OTHERS}
    return [f"{name}=={pins[name]}" for name in sorted(pins)]


def copy_code(folder: Path, stage: Stage) -> None:
    """Copy the modules that answer requests: `capas.use.served_model` and everything that it imports."""
    for file in code_files(stage):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stage.root / file, folder / file)


def code_files(stage: Stage) -> list[str]:
    return sorted(CodeReader(stage.root).covered(ANSWERING))


def code_digest(stage: Stage) -> str:
    """Return a digest of the modules that are saved with the model."""
    contents = [(stage.root / file).read_bytes() for file in code_files(stage)]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


def num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _has_turns(record: Mapping[str, Any]) -> bool:
    return sum(message["role"] == "user" for message in record["messages"]) > 1


def _copy(source: Path, target: Path) -> None:
    # copyfile leaves out the mode: files from DVC are read-only
    shutil.copytree(source, target, copy_function=shutil.copyfile)
