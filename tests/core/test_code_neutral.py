"""The modules that decide no byte: a training with all of them replaced writes the same bytes."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from tiny import write_workspace
from workspace import ENVIRONMENT, REPOSITORY

from capas.core.code_digests import CODE, DECIDES_NO_BYTE, digests, dump

# Appended to each module: other numbers, other texts, no locks. `_seen` leaves a mark, so that a replacement
# which is never reached cannot pass for a proof.
SEEN = """
def _seen():
    from pathlib import Path
    Path("replaced").mkdir(exist_ok=True)
    (Path("replaced") / (__name__ + ".py")).touch()

"""
REPLACED = {
    "capas/training/activations.py": """
_measure = measure
def measure(*args, **kwargs):
    _seen()
    found, held = _measure(*args, **kwargs)
    return {name: 3 * value for name, value in found.items()}, held and 3 * held
""",
    "capas/training/capacity.py": """
def free_bytes(device):
    _seen()
    return 2**60
def used_bytes(device):
    return 12345
def device_costs(device):
    return {"device_bytes": 1}
""",
    "capas/core/code_digests.py": """
def check_loaded(*args):
    _seen()
""",
    "capas/core/errors.py": """
def _other(self):
    _seen()
    return "another text"
CapasError.__str__ = _other
""",
    "capas/training/malloc_heap.py": """
_in_child = in_child
def in_child(work):
    _seen()
    return [2 * value for value in _in_child(work)]
""",
    "capas/training/live_rows.py": """
def start_check(root, enabled):
    _seen()
    return lambda: None
@contextmanager
def tracker(root, key, enabled):
    yield Rows(None)
""",
    "capas/core/locks.py": """
@contextmanager
def exclusive(file, seconds=0):
    _seen()
    with file.open("a+") as lock:
        yield lock
""",
    "capas/training/memory.py": """
def summary(*args):
    _seen()
    return "a summary"
def check(*args):
    pass
def costs(*args):
    return {"estimated": str(CapasError("whatever"))}
""",
    "capas/core/progress.py": """
@contextmanager
def doing(text, total=None):
    _seen()
    yield Activity(text, total)
@contextmanager
def heartbeat(seconds=1.0):
    _seen()
    yield
""",
}
RESULTS = (
    *("data/models/adapter", "reports/certificate.json", "reports/train.json"),
    *("reports/history.csv", "reports/validation.csv", "reports/metrics/train.json"),
)


def train(root: Path, replaced: dict[str, str]) -> dict[str, str]:
    """Train in a process of its own, as DVC does; return {file: sha256} of what it wrote."""
    root.mkdir()
    write_workspace(root, ["tracking=none"])
    (root / "capas").unlink()
    shutil.copytree(REPOSITORY / "capas", root / "capas", ignore=shutil.ignore_patterns("__pyc*"))
    for name, text in replaced.items():
        with (root / name).open("a", encoding="utf-8") as module:
            module.write(SEEN + text)
    assert dump(digests(root)) == (root / CODE).read_text()
    done = subprocess.run(
        [sys.executable, "stages/train_lora.py"],
        cwd=root,
        env={**ENVIRONMENT, "HOME": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = [f for result in RESULTS for f in (root / result, *(root / result).glob("*"))]
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def test_replaced_modules_change_no_byte_of_a_training(tmp_path: Path) -> None:
    assert set(REPLACED) == set(DECIDES_NO_BYTE)
    right = train(tmp_path / "right", {})
    found = train(tmp_path / "replaced", REPLACED)
    assert len(right) > 8
    assert found == right
    seen = {
        f"{file.stem.replace('.', '/')}.py" for file in (tmp_path / "replaced/replaced").iterdir()
    }
    assert seen == set(REPLACED)
