"""The folders of capas/ are layers: each imports only from itself and from those above it in this list."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from workspace import REPOSITORY

from capas.core.code_digests import CodeReader

CAPAS = REPOSITORY / "capas"
_MODULE = re.compile(r"capas(\.[a-z_]+){2,}")
# Started as a process of its own: a training does not wait for MLflow.
STARTED = {"capas/training/live_rows.py imports capas.tracking.live_sender"}
# Started by modules from which they import; that is no circle.
PROCESSES = {"capas/tracking/live_sender.py", "capas/training/local_agent.py"}
LAYERS = (
    *("core", "hub", "models", "chat", "dataset", "training", "evaluation", "config"),
    *("tracking", "report", "workspace", "use", "compare", "sweep"),
)


def layer_of(module: str) -> str:
    return module.split(".")[1]


def imported(file: Path) -> Iterator[str]:
    """Every module of capas that a file imports or starts, inside functions and for type checkers, too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = (
            [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        )
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide the layer"
            names = [f"{node.module}.{name}" for name in names]
        if isinstance(node, ast.Constant) and _MODULE.fullmatch(str(node.value)):
            names = [node.value]  # python -m capas.core.guard
        yield from (name for name in names if name.split(".")[0] == "capas")


def test_every_module_is_in_a_layer() -> None:
    assert {f.name for f in CAPAS.glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {f.name for f in CAPAS.iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders == set(LAYERS)
    assert len(LAYERS) == 14


def test_tests_stand_in_the_folder_of_what_they_test() -> None:
    tests = REPOSITORY / "tests"
    assert [f.name for f in tests.glob("*.py")] == ["conftest.py"]
    folders = {f.name for f in tests.iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders == {*LAYERS, "pipeline", "repository", "support", "mutations"}
    assert not list((tests / "support").rglob("test_*.py"))


def test_every_import_points_upwards() -> None:
    files = [file for name in LAYERS for file in sorted((CAPAS / name).rglob("*.py"))]
    assert len(files) > 200
    downwards = [
        f"{file.relative_to(REPOSITORY)} imports {name}"
        for file in files
        for name in imported(file)
        if LAYERS.index(layer_of(name)) > LAYERS.index(file.relative_to(CAPAS).parts[0])
    ]
    assert set(downwards) == STARTED


def test_no_module_imports_itself_over_others() -> None:
    """Imports inside functions count; those for type checkers alone do not."""
    reader = CodeReader(REPOSITORY)
    files = [f.relative_to(REPOSITORY).as_posix() for f in CAPAS.rglob("*.py")]
    modules = [file for file in files if not file.endswith("/__init__.py")]
    graph = {
        module: reader.imported(module) & {*modules} - PROCESSES - {module} for module in modules
    }
    order = list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert len(order) == len(modules) > 200


def test_every_folder_has_a_caption() -> None:
    for name in LAYERS:
        caption = ast.get_docstring(ast.parse((CAPAS / name / "__init__.py").read_text()))
        assert caption and caption.endswith(".") and "\n" not in caption, name


def test_contributing_shows_every_folder_with_its_caption() -> None:
    shown = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in LAYERS:
        caption = ast.get_docstring(ast.parse((CAPAS / name / "__init__.py").read_text()))
        assert f"| `capas/{name}/` | {caption} |" in shown


def test_the_walks_in_contributing_name_files_that_exist() -> None:
    shown = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walks = shown[shown.index("Three walks") : shown.index("## Tests")]
    files = re.findall(r"`([a-z_/]+\.py)`", walks)
    assert len(files) > 20
    roots = (REPOSITORY, CAPAS)
    assert [f for f in files if not any((root / f).exists() for root in roots)] == []


def test_completions_are_generated_in_one_place() -> None:
    """In generation.py and its parts; the others measure the time of a token, and stream to a terminal."""
    files = [*CAPAS.rglob("*.py"), *(REPOSITORY / "stages").glob("*.py")]
    generating = {
        str(file.relative_to(CAPAS))
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "generate"
    }
    parts = {f"evaluation/{name}.py" for name in ("generation", "greedy", "prefix")}
    assert generating == parts | {"config/duration.py", "use/chat.py"}
    modules = {"capas.evaluation.greedy", "capas.evaluation.prefix"}
    users = {
        str(file.relative_to(REPOSITORY))
        for file in files
        if not modules.isdisjoint(map(_module, imported(file)))
    }
    scoring = "capas/evaluation/label_batches.py"  # labels after a copied prompt
    assert users == {"capas/evaluation/generation.py", "capas/evaluation/prefix.py", scoring}


def _module(name: str) -> str:
    """Return the module of an imported name."""
    return name.rpartition(".")[0]
