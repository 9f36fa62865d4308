"""Serve the tuned model as MLflow loads it: prompts in, greedy completions out.

    model = mlflow.pyfunc.load_model("runs:/RUN_ID/model")
    model.predict(pd.DataFrame({"prompt": ["set a timer for 99 minutes"]}))   # a column `completion`

A row has either a `prompt`, which follows the system message and the tools of the training, or `messages`
(role and content), as a list or as JSON. It may have `tools`, in the same form, if the template supports
them. This module and its imports are saved with the model. `capas.use.mlflow_model` writes the folder:

    adapter/   weights (a whole model if all were trained), tokenizer, template
    base/      the base, if it is small enough to include
    chat.json  the template's tokens             served.json   the settings of the evaluation
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.chat.format import ChatFormat
from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.params import Params
from capas.models import hardware

if TYPE_CHECKING:
    import pandas as pd
    import torch

log = logging.getLogger("capas")
BASE = "CAPAS_BASE"  # names a folder with the base, needed if that is not on the Hub
_BASE_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


def _load_pyfunc(path: str) -> "Served":
    """Load the model; MLflow calls this function."""
    return Served(Path(path))


class Served:
    """The model in a folder of `capas.use.mlflow_model`.

    Raises:
        CapasError: template and tokenizer no longer give the token ids of training, or there is no base.
    """

    def __init__(self, folder: Path) -> None:
        self.facts, self.chat = read_json(folder / "served.json"), read_json(folder / "chat.json")
        device = choose_device(self.facts["hardware"])
        from capas.models.loading import TunedModel, load_model

        adapter, chat = folder / "adapter", self.chat
        text = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
        given = (text, adapter, chat["date_string"], chat["system"], chat["allowed_tokens"])
        self.format = ChatFormat.load(*given)
        if self.format.probes_sha256() != chat["probes_sha256"]:
            raise CapasError(
                f"{folder}: chat template and tokenizer no longer give the token ids of training. "
                "Install the packages in the model's requirements.txt"
            )
        model = Params(self.facts["model"])

        def load_base() -> Any:
            base = base_folder(folder, self.facts["base"])
            return load_model(base, model, device, **self._quantization())

        self.tools = self.facts.get("tools")  # models published by an earlier capas lack the key
        self.tuned = TunedModel(adapter, model, device, load_base)
        self.model: Any = self.tuned.model

    def predict(
        self, model_input: "pd.DataFrame", params: Mapping[str, Any] | None = None
    ) -> "pd.DataFrame":
        """Return a greedy completion of every row.

        Args:
            params: max_new_tokens and batch_size, to replace those of the evaluation.

        Raises:
            CapasError: a row has no prompt, or the chat template refuses it.
        """
        import pandas as pd

        from capas.evaluation.generation import complete, generation_config

        chosen = {**self.facts, **(params or {})}
        rows = model_input.to_dict("records")
        prompts = [self._prompt_ids(i, row) for i, row in enumerate(rows)]
        config = generation_config(self.chat, int(chosen["max_new_tokens"]))
        found = complete(self.model, prompts, config, int(chosen["batch_size"]))
        texts = [self.format.decode(group[0].input_ids) for group in found]
        return pd.DataFrame({"completion": texts}, index=model_input.index)

    def _prompt_ids(self, number: int, row: Mapping[Any, Any]) -> list[int]:
        try:
            messages = messages_of(row, self.facts["system"], self.facts["role"])
            tools = _parsed(row, "tools")
            if tools is None and _parsed(row, "messages") is None:
                tools = self.tools
            return self.format.prompt_ids(messages, tools)
        except CapasError as error:
            raise CapasError(f"row {number}: {error}") from None

    def _quantization(self) -> dict[str, Any]:
        """Return how to quantize a full-precision base while loading it; empty for a packed base."""
        quantization = self.facts["base"]["quantization"]
        if quantization is None:
            return {}
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(**quantization)}


def messages_of(row: Mapping[Any, Any], system: str | None, role: str) -> list[dict[str, Any]]:
    """Return the conversation of a row.

    Raises:
        CapasError: the row has none, or its conversation does not end with a message to answer.
    """
    messages = _parsed(row, "messages")
    if messages is None:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise CapasError("expected a `prompt` (text) or `messages` (role and content)")
        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, {"role": role, "content": prompt}]
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise CapasError(f"`messages` must hold objects with role and content, not {message!r}")
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        raise CapasError("`messages` must end with a message to answer, e.g. of the user")
    return [dict(message) for message in messages]


def _parsed(row: Mapping[Any, Any], column: str) -> list[Any] | None:
    value: Any = row.get(column)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise CapasError(f"`{column}` is not valid JSON: {error}") from None
        if not isinstance(value, list):
            raise CapasError(f"`{column}` must be a list, not {type(value).__name__}")
    if hasattr(value, "tolist"):
        value = value.tolist()  # a numpy array
    return list(value) if isinstance(value, list | tuple) else None  # None and NaN mean not given


def base_folder(folder: Path, base: Mapping[str, Any]) -> Path:
    """Return the folder with the base's weights: packed, in CAPAS_BASE, or from the Hub (offline: its cache).

    Raises:
        CapasError: none of these has them.
    """
    if base["packed"]:
        return folder / "base"
    name, revision = base["model_name_or_path"], base["revision"]
    if own := os.environ.get(BASE):
        if not (Path(own) / "config.json").is_file():
            raise CapasError(f"{BASE}={own} is not a model folder: it has no config.json")
        return Path(own)
    if revision is None or not base["hub"]:
        raise CapasError(
            f"this model needs the base {name}, a local folder on the machine that trained it. Set "
            f"{BASE} to a folder with this base"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_BASE_FILES, *(["*.py"] if base["trust_remote_code"] else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CapasError(
            f"the base {name} at {revision} cannot be loaded: {error}. Download it once with a "
            f"network, `hf download {name} --revision {revision}`, or set {BASE} to a folder with "
            "it"
        ) from None


def choose_device(recorded: Mapping[str, Any]) -> "torch.device":
    """Prepare the device of the evaluation, or else one that is available.

    Another device, or other kernels, may change the last bits.
    """
    chosen = dict(recorded)
    if recorded["device"] == "cuda" and not _has_gpu():
        log.warning("the model was evaluated on a GPU and runs on the CPU here")
        chosen |= {"device": "cpu", "instruction_set": "native"}
    elif "torch" in sys.modules:  # its kernels are already chosen
        chosen["instruction_set"] = "native"
    try:
        return hardware.prepare(Params(chosen))
    except CapasError as error:
        if chosen["instruction_set"] == "native":
            raise
        log.warning("%s: completions may differ from the evaluation", error)
        return hardware.prepare(Params(chosen | {"instruction_set": "native"}))


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()
