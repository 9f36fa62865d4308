"""How long it takes to make ids and loss masks of chat records: capas beside what else there is.

    python benchmarks/dataprep.py [FILE.jsonl] [--tokenizer DIR] [--contestants a,b] [--records N]
    python benchmarks/dataprep.py --million          e on the records and on 1,000,000: does memory grow?
    python benchmarks/dataprep.py --sentencepiece    a and e with the tokenizers of Mistral v3 and Gemma 2

a  the limit of `tokenizers`: encode_batch_fast on text that is rendered already
b  `datasets.map` with `apply_chat_template` and the mask of assistant tokens, batched, 2 processes
c  TRL's SFTTrainer with assistant_only_loss: what it does before it trains, 2 processes
d  torchtune's SFTDataset (Llama 3 only), 2 workers
e  capas: the stages `tokenize` and `format` as whole processes, one after the other, with all their files

`work` are the seconds of the preparation itself, as each contestant's file in contestants/ says; `whole`
those of its processes from start to end, imports included; `cpu` the processor time of these; `memory` the
peak of a process and its children, in a turn of its own. The contestants take turns (`--repeats`); figures
are medians, and ratios are taken within a turn. Without FILE: the kit of real records and tokenizers, which
is not part of the repository. c and d get environments of their own in .dvc/tmp/benchmarks. The table is
printed, the figures go to results/dataprep*.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
from arena import ROOT, make_workspace
from environments import environment
from process import ProgramError, measure

HERE = Path(__file__).resolve().parent / "contestants"
KIT = ROOT.parent / "shared/kit"
PACKAGES = {
    "c": ["--no-deps", "trl==1.15.0"],
    "d": ["torchtune==0.6.1", "torchao==0.10.0", "torch==2.13.0"],
}
NAMES = {
    "a": "tokenizers, its limit",
    "b": "datasets.map",
    "c": "TRL",
    "d": "torchtune",
    "e": "capas",
}
STAGES = {"tokenize": "tokenize_messages", "format": "format_chat"}
PRESETS = {"llama3": "llama3", "qwen2.5": "qwen", "mistral-v3": "mistral", "gemma2": "gemma"}
MILLION = 1_000_000
CLOCKS = ("seconds", "whole_seconds", "cpu_seconds")

Facts = dict[str, Any]


def main(options: argparse.Namespace) -> None:
    if options.million:
        result, name = million(options), "dataprep_million.json"
    elif options.sentencepiece:
        result, name = sentencepiece(options), "dataprep_sentencepiece.json"
    else:
        result, name = contest(options, options.tokenizer), "dataprep.json"
    packages = ("datasets", "pyarrow", "tokenizers", "fastokens", "transformers")
    text = json.dumps({**result, **machine.describe(*packages)}, indent=2) + "\n"
    (options.result or Path(__file__).parent / "results" / name).write_text(text)


def contest(options: argparse.Namespace, tokenizer: Path) -> Facts:
    with TemporaryDirectory() as folder:
        arena = Arena(Path(folder), tokenizer, options)
        num_records = arena.prepare(repeat=1)
        first = arena.turn(options.contestants)
        arena.sampled = False  # it costs time
        rounds = [arena.turn(options.contestants) for _ in range(options.repeats)]
        for turn in rounds:
            for key, facts in turn.items():
                facts["peak_memory_bytes"] = first[key].get("peak_memory_bytes")
        equal = arena.compare(rounds[-1])
    summaries = {key: summary([turn[key] for turn in rounds]) for key in options.contestants}
    result = {
        "file": options.file.name,
        "tokenizer": tokenizer.name,
        "num_records": num_records,
        "repeats": options.repeats,
        "contestants": summaries,
        "ratios": ratios(rounds),
        "b_and_e": equal,
    }
    show(result)
    return result


def sentencepiece(options: argparse.Namespace) -> Facts:
    options.contestants = [key for key in options.contestants if key in "ae"]
    tokenizers = [options.tokenizer.parent / name for name in ("mistral-v3", "gemma2")]
    return {tokenizer.name: contest(options, tokenizer) for tokenizer in tokenizers}


def million(options: argparse.Namespace) -> Facts:
    """(e) on the records once and on `--records`, or 1,000,000, of the same numbered ones."""
    results: Facts = {}
    for limit in (None, options.records or MILLION):
        with TemporaryDirectory() as folder:
            arena = Arena(Path(folder), options.tokenizer, options)
            num_records = arena.prepare(repeat=1 if limit is None else limit, limit=limit)
            facts = results[f"{num_records}"] = summary([arena.run("e")])
        show({"num_records": num_records, "contestants": {"e": facts}, "ratios": {}})
    return results


class Arena:
    """A temporary folder with the records, where contestants run."""

    def __init__(self, folder: Path, tokenizer: Path, options: argparse.Namespace) -> None:
        self.folder, self.tokenizer, self.options = folder, tokenizer, options
        self.workspace = folder / "workspace"
        self.sampled = True
        self.env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "huggingface"),
            "HF_DATASETS_CACHE": str(folder / "huggingface/datasets"),
        }
        training = tokenizer / "chat_template_training.jinja"  # the same text, answers marked
        self.template = training if training.exists() else tokenizer / "chat_template.jinja"

    def prepare(self, repeat: int, limit: int | None = None) -> int:
        """Write the records in all the forms that contestants take; returns their number."""
        arguments = [self.options.file, self.folder, "--repeat", repeat]
        if limit or self.options.records:
            arguments += ["--records", limit or self.options.records]
        if limit is None and not self.options.million:
            arguments += ["--tokenizer", self.tokenizer, "--template", self.template]
        num_records: int = self._program("prepare", *arguments)["num_records"]
        self._make_workspace()
        return num_records

    def turn(self, contestants: list[str]) -> dict[str, Facts]:
        return {key: self.run(key) for key in contestants}

    def run(self, key: str) -> Facts:
        """One contestant, once; `failed` with the error where it cannot."""
        runs: dict[str, Callable[[], Facts]] = {
            "a": lambda: self._program("tokenizers_limit", self.folder, self.tokenizer),
            "b": lambda: self._chat("datasets_map"),
            "c": lambda: self._chat("trl_sft", environment("trl", PACKAGES["c"], parent=True)),
            "d": lambda: self._program(
                "torchtune_sft",
                self.folder,
                self.tokenizer,
                python=environment("torchtune", PACKAGES["d"]),
            ),
            "e": self._capas,
        }
        for cache in ("map", "trl", "torchtune", "huggingface"):
            if cache != "map" or key == "b":  # compare() reads what (b) wrote
                shutil.rmtree(self.folder / cache, ignore_errors=True)
        print(f"{NAMES[key]} ...", file=sys.stderr)
        try:
            return runs[key]()
        except (ProgramError, subprocess.CalledProcessError) as error:
            return {"failed": str(error)}

    def compare(self, turn: dict[str, Facts]) -> Facts | None:
        files = turn.get("b", {}).get("files")
        if not files or "seconds" not in turn.get("e", {}):
            return None
        equal = self._program("compare", self.workspace, *files)
        return {key: equal[key] for key in ("num_records", "num_equal_ids", "num_equal_masks")}

    def _capas(self) -> Facts:
        stages = {
            name: measure(
                [sys.executable, f"stages/{script}.py"], self.workspace, self.env, self.sampled
            )
            for name, script in STAGES.items()
        }
        for name, facts in stages.items():
            timing = self.workspace / f"reports/timings/{name}.json"
            facts["seconds"] = json.loads(timing.read_text())["seconds"]
        splits = json.loads((self.workspace / "reports/format.json").read_text())["splits"].values()
        counts = ("num_tokens", "num_supervised_tokens")
        return {
            **{key: sum(f[key] for f in stages.values()) for key in CLOCKS},
            **{key: sum(split[key] for split in splits) for key in counts},
            "peak_memory_bytes": max(f["peak_memory_bytes"] for f in stages.values()),
            "stages": stages,
        }

    def _chat(self, script: str, python: str = sys.executable) -> Facts:
        return self._program(script, self.folder, self.tokenizer, self.template, python=python)

    def _program(self, script: str, *arguments: Any, python: str = sys.executable) -> Facts:
        command = [python, str(HERE / f"{script}.py"), *map(str, arguments)]
        return measure(command, ROOT, self.env, self.sampled)

    def _make_workspace(self) -> None:
        """What the two stages read, beside the records."""
        folder = self.workspace / "data/models/tokenizer"
        folder.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.tokenizer / name, folder)
        preset = self.options.chat_template or PRESETS[self.tokenizer.name]
        values = [f"chat_template={preset}", "dataset.max_length=1000000"]
        make_workspace(self.workspace, values, self.env)


def summary(runs: list[Facts]) -> Facts:
    """Medians of one contestant's turns; counts and versions as the last turn gave them."""
    if failed := [facts for facts in runs if "failed" in facts]:
        return failed[0]
    facts = {key: value for key, value in runs[-1].items() if key not in ("files", "stages")}
    for key in CLOCKS:
        facts[key] = round(statistics.median(run[key] for run in runs), 2)
        facts[f"{key}_of_each_turn"] = [round(run[key], 2) for run in runs]
    facts["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in runs)
    if "stages" in runs[-1]:
        facts["stages"] = {
            stage: summary([run["stages"][stage] for run in runs]) for stage in STAGES
        }
    return facts


def ratios(rounds: list[dict[str, Facts]]) -> dict[str, float]:
    """How many times capas' seconds the others take: the median over turns."""
    found = {}
    for kind in CLOCKS:
        for key in rounds[0].keys() - {"e"}:
            pairs = [(turn[key].get(kind), turn.get("e", {}).get(kind)) for turn in rounds]
            if all(ours and theirs for theirs, ours in pairs):
                of_turns = [theirs / ours for theirs, ours in pairs]
                found[f"{key}/e {kind}"] = round(statistics.median(of_turns), 2)
    return dict(sorted(found.items()))


def show(result: Facts) -> None:
    print(f"\n{result['num_records']} records, {result.get('tokenizer', '')}")
    print(
        "   contestant             work s  whole s    cpu s   tokens/s  memory MiB     tokens   supervised"
    )
    for key, facts in result["contestants"].items():
        print(f"{key}  {NAMES[key]:21}", line(facts))
    for name, ratio in result["ratios"].items():
        print(f"{name:20} {ratio:6.2f}")
    if equal := result.get("b_and_e"):
        print(
            "b and e: {num_records} records, ids equal in {num_equal_ids},".format(**equal), end=""
        )
        print(" masks in {num_equal_masks}".format(**equal))


def line(facts: Facts) -> str:
    if "failed" in facts:
        return f"failed: {facts['failed']}"
    memory, rate = facts["peak_memory_bytes"] / 2**20, facts["num_tokens"] / facts["seconds"]
    return (
        f"{facts['seconds']:7.2f} {facts['whole_seconds']:8.2f} {facts['cpu_seconds']:8.2f} "
        f"{rate:10,.0f} {memory:11,.0f} "
        f"{facts['num_tokens']:10,} {facts.get('num_supervised_tokens', '-'):>12}"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kit = KIT / "data/instructions_52k.jsonl.gz"
    parser.add_argument("file", type=Path, nargs="?", default=kit, help="messages, or instructions")
    parser.add_argument("--tokenizer", type=Path, default=KIT / "tok/llama3")
    parser.add_argument("--chat-template", help="a preset of conf/chat_template for --tokenizer")
    parser.add_argument("--contestants", type=lambda text: text.split(","), default=list("abcde"))
    parser.add_argument("--records", type=int, help="take the first N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--sentencepiece", action="store_true")
    parser.add_argument("--result", type=Path, help="a file for the figures, other than results/")
    options = parser.parse_args()
    for path in (options.file, options.tokenizer):
        if not path.exists():
            parser.error(
                f"there is no {path}; name a file of records and --tokenizer, a folder with a "
                "tokenizer.json and a chat_template_training.jinja"
            )
    if options.tokenizer.name not in PRESETS and not options.chat_template:
        parser.error(
            f"--chat-template: which preset of conf/chat_template is {options.tokenizer}'s?"
        )
    if unknown := set(options.contestants) - NAMES.keys():
        parser.error(f"--contestants: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    options.file, options.tokenizer = options.file.resolve(), options.tokenizer.resolve()
    return options


if __name__ == "__main__":
    main(parse_options())
