"""Compute a digest of the code behind each stage's outputs, which compose writes to code.yaml for DVC.

A stage declares `params: - code.yaml: [train_lora]`, by the name of its script, instead of a list of modules.
The digest covers the script, every module of this package that the script imports (directly or not, even
inside a function), and the data files (templates, texts, styles) in the folders of these modules. It is taken
of each file's syntax tree, without the parts that change no byte of a result and so need no rerun:

- comments, docstrings, formatting, and imports for type checkers alone;
- the texts of `raise CapasError(...)`, after which a stage writes nothing, and of log lines;
- the modules in DECIDES_NO_BYTE.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from capas.core.dag import StageSpec, is_left_over
from capas.core.errors import CapasError
from capas.core.files import write_whole

CODE = "code.yaml"
PACKAGE, STAGES = "capas", "stages"
_RUNNER = "capas/core/stage.py"  # a script that imports it is the script of a stage
# Modules that stages import although they decide no byte of the outputs, with their purpose;
# tests/core/test_code_neutral.py trains with each of them replaced.
DECIDES_NO_BYTE = {
    "capas/training/activations.py": "estimates the memory of activations",
    "capas/training/capacity.py": "measures free memory",
    "capas/core/code.py": "computes these digests",
    "capas/core/errors.py": "formats error messages, after which nothing is written",
    "capas/training/malloc_heap.py": "measures memory",
    "capas/training/live_rows.py": "sends log rows to MLflow while a training runs",
    "capas/core/locks.py": "keeps two processes from running one stage",
    "capas/training/memory.py": "estimates memory before a training",
    "capas/core/progress.py": "logs progress",
}
_CACHE = Path(".dvc/tmp/code.json")
_VERSION = 2  # of the cache and of the serialization; a new one empties the cache
_NO_VALUE = ("ctx", "kind", "type_comment", "type_ignores")  # fields of nodes that change no result
_LOGGERS = ("log", "logger")
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class _Source:
    """A Python file: digests of its content and of its syntax tree, and the names that it may import."""

    content: str
    digest: str
    imports: tuple[str, ...]


class CodeReader:
    """A reader of a repository's files, each read once; digests are cached in .dvc/tmp between processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cache = self._read_cache()
        self._known: dict[str, _Source] = {}
        self._added = False

    def files(self, script: str) -> dict[str, str]:
        """Return {file: digest} of all files that decide the bytes `script` writes, sorted by name.

        Raises:
            CapasError: a file is missing, or is not Python.
        """
        modules = self._closure(script, frozenset(DECIDES_NO_BYTE))
        found = {name: self._source(name).digest for name in modules}
        own = {name for name in modules if name != script and not name.endswith("/__init__.py")}
        for folder in {str(PurePosixPath(name).parent) for name in own}:
            for file in sorted((self._root / folder).iterdir()):
                if file.is_file() and file.suffix != ".py" and not is_left_over(file.name):
                    content = file.read_bytes()
                    found[file.relative_to(self._root).as_posix()] = _sha256(content)
        return dict(sorted(found.items()))

    def covered(self, script: str) -> set[str]:
        """Return the modules that `script` may import, including those in DECIDES_NO_BYTE."""
        return self._closure(script, frozenset())

    def imported(self, file: str) -> set[str]:
        """Return the files that a file itself imports, with the `__init__.py` of each package on the way."""
        found = set(self._imported(file))
        self._write_cache()
        return found

    def _closure(self, script: str, without: frozenset[str]) -> set[str]:
        found: set[str] = set()
        waiting = [script]
        while waiting:
            name = waiting.pop()
            if name not in found and name not in without:
                found.add(name)
                waiting += self._imported(name)
        self._write_cache()
        return found

    def _imported(self, name: str) -> Iterator[str]:
        """Yield the files that a file imports, and the `__init__.py` of each package on the way."""
        for dotted in self._source(name).imports:
            parts = dotted.split(".")
            for end in range(1, len(parts) + 1):
                path = "/".join(parts[:end])
                for file in (f"{path}.py", f"{path}/__init__.py"):
                    if (self._root / file).is_file():
                        yield file

    def _source(self, name: str) -> _Source:
        if name not in self._known:
            self._known[name] = self._parsed(name)
        return self._known[name]

    def _parsed(self, name: str) -> _Source:
        try:
            content = (self._root / name).read_bytes()
        except FileNotFoundError:
            raise CapasError(f"{name} is missing") from None
        key = _sha256(content)
        cached = self._cache.get(name)
        if cached and cached.content == key:
            return cached
        try:
            tree = ast.parse(content, name)
        except SyntaxError as error:
            raise CapasError(
                f"{name}, line {error.lineno} is not valid Python: {error.msg}"
            ) from None
        imports = tuple(sorted({*_imports(tree, name)}))
        self._cache[name] = _Source(key, _sha256(serialize(tree).encode()), imports)
        self._added = True
        return self._cache[name]

    def _read_cache(self) -> dict[str, _Source]:
        try:
            found = json.loads((self._root / _CACHE).read_text(encoding="utf-8"))
            if found["version"] != _VERSION:
                return {}
            return {
                name: _Source(content, digest, tuple(imports))
                for name, (content, digest, imports) in found["files"].items()
            }
        except (OSError, ValueError, LookupError, TypeError):
            return {}  # another version, or half-written: the cache is rebuilt

    def _write_cache(self) -> None:
        if not self._added:
            return
        files = {name: [s.content, s.digest, s.imports] for name, s in self._cache.items()}
        write_whole(self._root / _CACHE, json.dumps({"version": _VERSION, "files": files}))
        self._added = False


def digest_of(files: Mapping[str, str]) -> str:
    """Return one digest of {file: digest}."""
    return _sha256("".join(f"{name} {found}\n" for name, found in files.items()).encode())


def digests(root: Path) -> dict[str, str]:
    """Return {script: digest of its code} of the scripts in stages/ that import `capas.core.stage`.

    The stages in dvc.yaml are not used: DVC cannot depend on dvc.yaml, so a new stage would not rerun
    compose.

    Raises:
        CapasError: a script, or a module that it imports, is not valid Python.
    """
    reader = CodeReader(root)
    scripts = (file.relative_to(root).as_posix() for file in sorted((root / STAGES).glob("*.py")))
    return {
        Path(script).stem: digest_of(reader.files(script))
        for script in scripts
        if _RUNNER in reader.imported(script)
    }


def dump(found: Mapping[str, str]) -> str:
    """Return code.yaml as text."""
    lines = [f'{name}: "{value}"' for name, value in found.items()]
    return (
        "\n".join(["# Digests of the code of each stage, by stages/compose_params.py.", *lines])
        + "\n"
    )


def script_of(spec: StageSpec) -> str:
    """Return the Python file in a stage's command, or an empty text if there is none."""
    return next((word for word in spec.cmd.split() if word.endswith(".py")), "")


def name_of(spec: StageSpec) -> str:
    """Return the key of a stage in code.yaml: the name of its script."""
    return Path(script_of(spec)).stem


def check_code(spec: StageSpec, root: Path, reader: CodeReader) -> None:
    """Check that code.yaml matches the present code, so that DVC records results under their own code.

    Raises:
        CapasError: it does not match, because compose has not run since an edit; or dvc.yaml declares another
            key of code.yaml.
    """
    if not _is_declared(spec):
        return
    recorded = spec.values(root)[CODE][name_of(spec)]
    if recorded != digest_of(reader.files(script_of(spec))):
        raise CapasError(
            f"the code of the stage '{spec.name}' was edited after compose wrote {CODE}. Run `dvc repro`, "
            "which composes first (`make due` names the files)"
        )


def check_loaded(spec: StageSpec, root: Path, reader: CodeReader) -> None:
    """Check that the stage's digest covers every module of the package that this process has loaded.

    Only a process that runs the stage's own script is checked.

    Raises:
        CapasError: a module is not covered, because the code imports it without an import statement.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    script = root / script_of(spec)
    if not _is_declared(spec) or main is None or Path(main).resolve() != script.resolve():
        return
    loaded = {
        Path(file).resolve().relative_to(root.resolve()).as_posix()
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == PACKAGE and (file := getattr(module, "__file__", None))
        if Path(file).resolve().is_relative_to(root.resolve())
    }
    if unseen := sorted(loaded - reader.covered(script_of(spec))):
        raise CapasError(
            f"the stage '{spec.name}' loaded {', '.join(unseen)}, which its digest in {CODE} does not cover. "
            "Import the module with an import statement"
        )


def _is_declared(spec: StageSpec) -> bool:
    keys = spec.params.get(CODE)
    if keys is None:
        return False
    if keys != [name_of(spec)]:
        raise CapasError(
            f"dvc.yaml: the stage '{spec.name}' declares {CODE}: {keys}; it must be [{name_of(spec)}], "
            "the name of its script"
        )
    return True


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the files whose digests differ, sorted."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def serialize(node: object) -> str:
    """Return a syntax tree as text, without the parts that change no byte of a result.

    The text is the same on every version of Python, unlike that of `ast.dump`. Strings are written in ASCII,
    whose escapes do not depend on a version's Unicode tables.
    """
    if isinstance(node, ast.AST):
        fields = ((name, _shown(node, name)) for name in node._fields if name not in _NO_VALUE)
        shown = (f"{name}={serialize(value)}" for name, value in fields if value not in (None, []))
        return f"({type(node).__name__} {' '.join(shown)})"
    if isinstance(node, list):
        return f"[{','.join(map(serialize, node))}]"
    return ascii(node)


def _shown(node: ast.AST, name: str) -> object:
    """Return a field of a node, without the parts that do not count."""
    value = getattr(node, name, None)
    if isinstance(value, list) and all(isinstance(inner, ast.stmt) for inner in value):
        if name == "body" and isinstance(node, _WITH_DOCSTRING) and _is_docstring(value[:1]):
            value = value[1:]
        return [statement for inner in value for statement in _counting(inner)]
    if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty strings to some f-strings
        return [i for i in node.values if not (isinstance(i, ast.Constant) and i.value == "")]
    if isinstance(node, ast.Raise) and _calls(node.exc, "CapasError"):
        return "CapasError" if name == "exc" else None  # without its message and its cause
    if isinstance(node, ast.Call) and name == "args" and _is_log(node.func):
        return [inner for inner in node.args if not _is_text(inner)]
    return value


def _counting(statement: ast.stmt) -> list[ast.stmt]:
    """Return the statements that count: for `if TYPE_CHECKING`, those of the other branch."""
    if isinstance(statement, ast.If) and _is_type_checking(statement.test):
        return [inner for found in statement.orelse for inner in _counting(found)]
    return [statement]


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _is_docstring(first: list[ast.stmt]) -> bool:
    return bool(first) and isinstance(first[0], ast.Expr) and _is_text(first[0].value)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_log(function: ast.expr) -> bool:
    """Return whether a call of this function writes a log line: `log.info`."""
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id in _LOGGERS
    )


def _calls(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _imports(tree: ast.AST, file: str) -> Iterator[str]:
    """Yield the dotted names of this package that a file may import: modules, and possible modules."""
    if isinstance(tree, ast.ImportFrom):
        module = _absolute(tree, file)
        if module.partition(".")[0] == PACKAGE:
            yield module
            yield from (f"{module}.{alias.name}" for alias in tree.names)
    elif isinstance(tree, ast.Import):
        yield from (a.name for a in tree.names if a.name.partition(".")[0] == PACKAGE)
    children: Iterable[ast.AST] = ast.iter_child_nodes(tree)
    if isinstance(tree, ast.If) and _is_type_checking(tree.test):
        children = tree.orelse
    for child in children:
        yield from _imports(child, file)


def _absolute(node: ast.ImportFrom, file: str) -> str:
    """Return the absolute name of an imported module, also for `from . import x`."""
    if not node.level:
        return node.module or ""
    folders = PurePosixPath(file).parent.parts
    base = folders[: len(folders) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
