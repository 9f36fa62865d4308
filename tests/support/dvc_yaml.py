"""The stages of dvc.yaml, their scripts, and the modules that these import."""

import ast

import yaml
from workspace import REPOSITORY

from capas.core.dag import StageSpec

PIPELINE = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]


NAMES = [
    *("compose", "fetch", "fetch_tokenizer", "fetch_model", "tokenize", "format", "quantize"),
    *("evaluate_base", "train", "evaluate", "sample", "report", "publish"),
]


def spec(name: str) -> StageSpec:
    return StageSpec.read(name, REPOSITORY)


def script(name: str) -> str:
    return spec(name).cmd.split()[1]


def imported_modules(file: str) -> set[str]:
    """Files of capas that a file imports, itself included, transitively; for type checkers alone, too."""
    found, todo = set(), [file]
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.add(current)
        for node in ast.walk(ast.parse((REPOSITORY / current).read_text(encoding="utf-8"))):
            todo += [f for f in _files_of(node) if (REPOSITORY / f).exists()]
    return found


def _files_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("capas"):
        base = node.module.replace(".", "/")
        return [f"{base}.py", *(f"{base}/{alias.name}.py" for alias in node.names)]
    if isinstance(node, ast.Import):
        return [f"{a.name.replace('.', '/')}.py" for a in node.names if a.name.startswith("capas")]
    if isinstance(node, ast.Constant) and str(node.value).startswith("capas."):
        return [f"{str(node.value).replace('.', '/')}.py"]  # python -m capas.core.guard
    return []
