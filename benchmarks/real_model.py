"""A real pretrained model through every stage, on records of a user's own, as the README says it.

    python benchmarks/real_model.py                              templated support questions
    python benchmarks/real_model.py --csv FILE.csv               a file of one's own
    python benchmarks/real_model.py quantization=nf4 trainer.max_steps=20

SmolLM2-135M-Instruct is made from PyPI (benchmarks/smollm2.py), the repository is cloned into a temporary
folder, and `capas check FILE --write`, `capas check --cost` and `dvc repro` run there with the recipe
smollm2_135m_lora_cpu. Prints a JSON object: seconds of each stage beside those that were predicted, the
longest silence of the log, and the scores of the base, of copying the nearest training answer, and of the
tuned model.
"""

import argparse
import csv
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "smollm2_135m_lora_cpu"
NUM_RECORDS = 500
NAMES = ("Ana", "Bruno", "Carla", "Diego", "Elena", "Farid", "Greta", "Hiro", "Ines", "Jonas")
ITEMS = [
    "lamp",
    "kettle",
    "desk",
    "chair",
    "router",
    "camera",
    "jacket",
    "printer",
    "bicycle",
    "tent",
]
CASES = (
    (
        "Hello, my name is {name} and I ordered a {item} on {day} May. The order number is "
        "{order} and it has not arrived yet. Could you tell me where it is?",
        "Hello {name}, thank you for writing to us. Your {item} with the order number {order} "
        "left our warehouse on {day} May and is with the carrier. If it has not arrived in three "
        "days, answer this message and we will send it again at no cost.",
    ),
    (
        "I was charged {amount} EUR twice for a {item}. {name} at the shop said that you would "
        "return one of the payments of order {order}. When will that be?",
        "We are sorry for the second payment. We have returned {amount} EUR for the {item} of "
        "order {order} today; your bank shows it within five working days. {name} was right to "
        "send you to us.",
    ),
    (
        "The {item} of order {order} is broken. I bought it for {amount} EUR, and {name} told me "
        "that it has a warranty. What do I have to do?",
        "That should not happen with a new {item}. Please pack it, write {order} on the parcel "
        "and take it to any post office: the warranty covers it. You may choose a new one or your"
        " {amount} EUR back. Greetings to {name}.",
    ),
    (
        "Can I still change the colour of the {item} in order {order}? I told {name} that I "
        "wanted the blue one, and I paid {amount} EUR for it.",
        "Yes, you can, as order {order} is not packed yet. We have noted that you want the {item}"
        " in blue; the price of {amount} EUR stays the same. {name} will see the change in the "
        "system.",
    ),
)


def main(options: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="real-model-") as name:
        folder = Path(name)
        model = options.model or folder / "smollm2"
        if not model.exists():
            run(sys.executable, str(ROOT / "benchmarks/smollm2.py"), str(model), cwd=ROOT)
        records = options.csv or write_records(folder / "support.csv")
        clone = folder / "capas"
        run("git", "clone", "--quiet", str(ROOT), str(clone), cwd=ROOT)
        run("capas", "check", str(records), "--write", cwd=clone)
        (written,) = (clone / "conf/own/dataset").glob("*.yaml")
        configure(clone, model, [f"dataset={written.stem}", *options.overrides])
        predicted = predicted_minutes(run("capas", "check", "--cost", cwd=clone, check=False))
        silence, seconds = reproduce(clone)
        print(json.dumps(report(clone, predicted, silence, seconds), indent=2))


def write_records(file: Path) -> Path:
    """Write support questions: four cases in which names, numbers and things change."""
    rng = random.Random(0)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "answer"])
        for _ in range(NUM_RECORDS):
            values = {
                "name": rng.choice(NAMES),
                "item": rng.choice(ITEMS),
                "day": rng.randrange(1, 29),
                "order": rng.randrange(10_000, 100_000),
                "amount": rng.randrange(5, 500),
            }
            writer.writerow([text.format(**values) for text in rng.choice(CASES)])
    return file


def configure(clone: Path, model: Path, overrides: list[str]) -> None:
    """Choose the recipe in conf/config.yaml, and put the folder and the overrides into its file."""
    config = clone / "conf/config.yaml"
    text = config.read_text(encoding="utf-8")
    text = text.replace("- experiment: none", f"- experiment: {RECIPE}")
    config.write_text(text, encoding="utf-8")
    preset = clone / "conf/model/smollm2_135m_instruct.yaml"
    text = preset.read_text(encoding="utf-8")
    text = re.sub(r"(?m)^model_name_or_path: .*$", f"model_name_or_path: {model.resolve()}", text)
    preset.write_text(text, encoding="utf-8")
    choices = [f"  - override /{o.replace('=', ': ')}" for o in overrides if "." not in o]
    values: dict[str, Any] = {}
    for override in overrides:
        if "." in override:
            key, _, value = override.partition("=")
            group, _, name = key.partition(".")
            values.setdefault(group, {})[name] = json.loads(value)
    lines = ["defaults:", *choices] if choices else []
    lines += [f"{group}: {json.dumps(found)}" for group, found in values.items()]
    if lines:
        (clone / "conf/overrides.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def predicted_minutes(said: str) -> dict[str, float]:
    """Read the minutes of each stage from what `capas check --cost` says."""
    found = re.search(r"about \d+ minutes \(([^)]*)\)", said)
    if found is None:
        sys.exit(f"real_model: capas check --cost says no minutes:\n{said}")
    pairs = (part.rsplit(" ", 1) for part in found[1].split(", "))
    return {stage: float(minutes) for stage, minutes in pairs}


def reproduce(clone: Path) -> tuple[float, float]:
    """Run `dvc repro`; return its longest silence and its time, in seconds."""
    started = last = time.monotonic()
    silence = 0.0
    process = subprocess.Popen(
        ["dvc", "repro"], cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        now = time.monotonic()
        silence, last = max(silence, now - last), now
        print(f"{now - started:7.1f}  {line}", end="", file=sys.stderr)
    if process.wait():
        sys.exit("real_model: dvc repro failed")
    return silence, time.monotonic() - started


def report(
    clone: Path, predicted: dict[str, float], silence: float, seconds: float
) -> dict[str, Any]:
    """Seconds by stage, predicted and true, and the scores."""
    files = sorted((clone / "reports/timings").glob("*.json"))
    stages = {file.stem: json.loads(file.read_text())["seconds"] for file in files}
    base = json.loads((clone / "reports/evaluation_base.json").read_text())
    found = json.loads((clone / "reports/evaluation.json").read_text())
    names = [*found["metrics"], "copied_value_rate"]
    models = {"base": base, "nearest": base["nearest"], "tuned": found["tuned"]}
    true = sum(stages[stage] for stage in predicted)
    answers = sum(stages[stage] for stage in ("evaluate_base", "evaluate", "sample"))
    return {
        "seconds": round(seconds, 1),
        "longest_silence_seconds": round(silence, 1),
        "stages": {
            stage: {"seconds": value, "predicted": round(60 * predicted[stage], 1)}
            if stage in predicted
            else {"seconds": value}
            for stage, value in stages.items()
        },
        "predicted_over_true": round(60 * sum(predicted.values()) / true, 3),
        "share_of_evaluation_and_samples": round(answers / sum(stages.values()), 3),
        "scores": {m: {name: facts[name] for name in names} for m, facts in models.items()},
        "over_nearest": found["difference_to_nearest"][found["metrics"][0]],
        "gate": found["gate"]["reasons"] or "passed",
        **machine.describe("torch", "transformers", "peft", "bitsandbytes"),
    }


def run(*command: str, cwd: Path, check: bool = True) -> str:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=check)
    return done.stdout


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, help="records, instead of the templated ones")
    parser.add_argument("--model", type=Path, help="the folder that benchmarks/smollm2.py made")
    parser.add_argument("overrides", nargs="*", help="as quantization=nf4 or trainer.max_steps=20")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_options())
