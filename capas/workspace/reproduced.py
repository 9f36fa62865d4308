"""Name the first stage whose bytes differ from the committed ones: `python -m capas.workspace.reproduced`.

`make repro` ends with it. On another kind of machine than the one that recorded the lock (ARM, a GPU),
different bytes are expected and harmless; it names the first stage that differs and both scores. Changes
that follow from an edit do not count.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from capas.core.dag import ancestors, read_yaml
from capas.models import kernels

LOCK, SCORES = "dvc.lock", "reports/metrics/tuned.json"
Lock = Mapping[str, Any]  # stage -> its entry in dvc.lock


def differences(before: Lock, after: Lock) -> list[str]:
    """Return a line for each stage with different results, in pipeline order; the first is the cause."""
    lines: list[str] = []
    for name in _in_order(before, after):
        changed = {kind: _changed(before[name], after[name], kind) for kind in ("deps", "outs")}
        if changed["outs"]:
            first = "first to differ: " if not lines else "differs too: "
            from_other = f", from different {', '.join(changed['deps'])}" if changed["deps"] else ""
            lines.append(f"{first}{name}: {', '.join(changed['outs'])}{from_other}")
    return lines


def first_to_differ(before: Lock, after: Lock) -> tuple[str, list[str]] | None:
    """Return the first stage that made different outputs from the same inputs, and the paths of these."""
    for name in _in_order(before, after):
        old, new = before[name], after[name]
        same = all(old.get(key) == new.get(key) for key in ("cmd", "params"))
        if same and not _changed(old, new, "deps") and (outs := _changed(old, new, "outs")):
            return name, outs
    return None


def describe(root: Path) -> str:
    """Return a message about different bytes in `root`; empty if there are none, or after an edit."""
    committed = _committed(root, LOCK)
    if committed is None:
        return ""
    before, after = yaml.safe_load(committed)["stages"], read_yaml(root / LOCK)["stages"]
    found = first_to_differ(before, after)
    if found is None:
        return ""
    stage, outs = found
    lines = [
        f"The results differ from the committed bytes: {stage} is the first stage that differs "
        f"({', '.join(outs)}), from the same inputs, on {kernels.cpu()['model']}.",
        *_scores(root),
    ]
    if (
        kernels.is_x86()
        and read_yaml(root / "params.yaml")["hardware"]["instruction_set"] == "portable"
    ):
        lines.append("This should not happen on an x86 CPU: please report it with the lines above.")
    else:
        lines.append(
            "This is harmless: another kind of CPU or a GPU rounds the last bits differently, and "
            "gives the same bytes on machines of its kind. To keep the committed results: git "
            "checkout dvc.lock reports && dvc checkout"
        )
    return "\n".join(lines)


def _in_order(before: Lock, after: Lock) -> list[str]:
    """Return the stages that both have, each after the stages that it depends on."""
    return sorted(set(before) & set(after), key=lambda stage: len(ancestors(stage, before)))


def _scores(root: Path) -> list[str]:
    committed, here = _committed(root, SCORES), root / SCORES
    if committed is None or not here.exists():
        return []
    old, new = json.loads(committed), json.loads(here.read_text(encoding="utf-8"))
    shared = [name for name in new if name in old and not name.startswith("perplexity")]
    if all(old[name] == new[name] for name in shared):
        return ["The scores equal the committed ones."]
    both = (
        f"{name} {old[name]:.4g} -> {new[name]:.4g}" for name in shared if old[name] != new[name]
    )
    return [f"Scores, committed -> here: {', '.join(both)}."]


def _committed(root: Path, file: str) -> str | None:
    """Return the file as the last commit has it; None outside of git, or if the commit lacks it."""
    done = subprocess.run(
        ["git", "show", f"HEAD:./{file}"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else None


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> list[str]:
    old = {entry["path"]: entry["md5"] for entry in before.get(kind, [])}
    new = {entry["path"]: entry["md5"] for entry in after.get(kind, [])}
    return [path for path in new if old.get(path) != new[path]]


if __name__ == "__main__":
    if text := describe(Path.cwd()):
        sys.stdout.write(text + "\n")
