"""Load metrics of the user's own: functions in a Python file, which compose copies for the stages.

`evaluation.metrics: [data/own/scores.py:politeness]` names the function

    def politeness(completion: str, reference: str, record: dict) -> float | bool

where `record` has id, metadata (a dict) and prompt (as text). DVC does not see what the file reads, or
imports from the project's folder: the file should contain all that its functions need.
"""

import ast
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from capas.core.errors import CapasError
from capas.evaluation.names import BUILT_IN

_LAST_BITS = 1e-9
Function = Callable[[str, str, dict[str, Any]], Any]
FOLDERS = ("conf", "data/own")  # folders in which compose notices an edit


def read_sources(
    metrics: Sequence[str], root: Path, key: str = "evaluation.metrics"
) -> dict[str, str]:
    """Return {file: text} for the user's own functions among `metrics`, sorted; nothing is executed.

    Args:
        key: where the metrics were chosen, for messages.

    Raises:
        CapasError: a file is missing, lies elsewhere, is not Python, or does not define its function.
    """
    own = sorted(metric for metric in metrics if metric not in BUILT_IN)
    sources = {}
    for metric in own:
        file, _, name = metric.rpartition(":")
        given = f"{key}: {metric}"
        sources[file] = _text(given, file, root)
        _check_defined(given, name, _parsed(given, file, sources[file]))
    return sources


def _text(given: str, file: str, root: Path) -> str:
    path = PurePosixPath(file)
    inside = [folder for folder in FOLDERS if path.is_relative_to(folder)]
    if not inside or ".." in path.parts:
        raise CapasError(
            f"{given}: move the file into {' or '.join(FOLDERS)}, so that edits rerun the stages"
        )
    if any((root / parent).is_symlink() for parent in path.parents):
        raise CapasError(f"{given}: a parent folder is a link, so DVC would not notice edits")
    if not (root / file).is_file():
        raise CapasError(f"{given}: there is no {file}")
    try:
        return (root / file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CapasError(f"{given}: {file} is not UTF-8: {error}") from None


def _parsed(given: str, file: str, source: str) -> ast.Module:
    try:
        return ast.parse(source, file)
    except (SyntaxError, ValueError) as error:
        raise CapasError(f"{given}: {file} is not valid Python: {error}") from None


def _check_defined(given: str, name: str, module: ast.Module) -> None:
    functions = [node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    stored = [
        node.id
        for node in ast.walk(module)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    if name not in (*functions, *stored):
        there = ", ".join(functions) or "no function"
        raise CapasError(f"{given}: the file defines no {name}; it has {there}")


class OwnMetric:
    """A function of the user's own, whose errors name file, function and record.

    Args:
        key, split: where the metric was chosen and which records it scores, for messages.
    """

    def __init__(
        self, metric: str, function: Function, key: str = "evaluation.metrics", split: str = "test"
    ) -> None:
        self._function, self._given, self._split = function, f"{key}: {metric}", split
        self._file = metric.rpartition(":")[0]

    def __call__(self, completion: str, reference: str, record: Mapping[str, Any]) -> float:
        """Return the function's score as a float, True as 1.

        Raises:
            CapasError: the function failed, or did not return a number from 0 to 1.
        """
        where = f"{self._given}, {self._split} record {record['id']}"
        try:
            value = self._function(completion, reference, dict(record))
        except Exception as error:
            raise CapasError(f"{where}: {_describe(error, self._file)}") from error
        score = _number(value)
        if score is None:
            raise CapasError(
                f"{where}: the function returned {value!r}; it must return a number from 0 to "
                "1, True or False"
            )
        return score


def _number(value: Any) -> float | None:
    """Return the score as a float, None if it is no number from 0 to 1; scalars of numpy and torch count."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    try:
        score = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return None
    rounded = min(max(score, 0.0), 1.0)  # by rounding, a mean of ones may be slightly above 1
    return rounded if abs(score - rounded) < _LAST_BITS else None


def load_functions(
    metrics: Sequence[str],
    sources: Mapping[str, str],
    key: str = "evaluation.metrics",
    split: str = "test",
) -> dict[str, OwnMetric]:
    """Return {metric: function}, loaded from the copies that compose made.

    Args:
        key, split: see `OwnMetric`.

    Raises:
        CapasError: there is no copy, or the file fails when it is executed, or lacks the function.
    """
    modules: dict[str, ModuleType] = {}
    functions = {}
    for metric in (metric for metric in metrics if metric not in BUILT_IN):
        file, _, name = metric.rpartition(":")
        given = f"{key}: {metric}"
        if file not in sources:
            raise CapasError(
                f"{given}: {file} has not been copied by compose. Run `dvc repro compose`"
            )
        if file not in modules:
            modules[file] = _executed(given, file, sources[file])
        function = getattr(modules[file], name, None)
        if not callable(function):
            raise CapasError(f"{given}: {file} has no function {name}")
        functions[metric] = OwnMetric(metric, function, key, split)
    return functions


def _executed(given: str, file: str, source: str) -> ModuleType:
    module = ModuleType("own_" + re.sub(r"\W", "_", file))
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look up their module
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except Exception as error:
        raise CapasError(f"{given}: {_describe(error, file)}") from error
    return module


def _describe(error: Exception, file: str) -> str:
    """Return an error as text with its place: 'KeyError: 'tone' (data/own/scores.py, line 7)'."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    at = f" ({file}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{at}"
