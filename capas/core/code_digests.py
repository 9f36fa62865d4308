"""Compute a digest of the code behind each stage's outputs, which compose writes to code.yaml for DVC.

A stage declares `params: - code.yaml: [train_lora]`, by the name of its script, instead of a list of
modules. The digest covers the script, every module of capas/ and stages/ that the script imports (directly
or not, inside a function too, or by a name in a text: `python -m capas.training.local_agent`), and the data
files beside these modules (templates, texts, styles). It is taken of each file's syntax tree, without the
parts that change no byte of a result and so need no rerun:

- comments, docstrings, formatting, and imports for type checkers alone;
- the texts of `raise CapasError(...)`, after which a stage writes nothing, and of log lines;
- the modules in DECIDES_NO_BYTE, and those in RECORDED_APART with what only they import.
"""

import ast
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from capas.core.dag import COMPILED, StageSpec, is_left_over
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
    "capas/core/code_digests.py": "computes these digests",
    "capas/core/errors.py": "formats error messages, after which nothing is written",
    "capas/training/malloc_heap.py": "measures memory",
    "capas/training/live_rows.py": "sends log rows to MLflow while a training runs",
    "capas/core/locks.py": "keeps two processes from running one stage",
    "capas/training/memory.py": "estimates memory before a training",
    "capas/core/progress.py": "logs progress",
}
# Modules that decide bytes under one setting alone. Under it, compose writes the digest of their code into a
# file that is a dep of the stages that import them. Other runs do not depend on their code.
RECORDED_APART = {
    "capas/evaluation/checkpoint_metric.py": "data/composed/checkpoint_metric.json",
}
_CACHE = Path(".dvc/tmp/code.json")
_MODULE = re.compile(PACKAGE + r"(\.[a-z_]\w*){2,}")  # a module named in a text
_NO_VALUE = ("ctx", "kind", "type_comment", "type_ignores")  # fields of nodes that change no result
_LOGGERS = ("log", "logger")
_LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class _Source:
    """A Python file: digests of its content and of its syntax tree, and the names that it may import."""

    content: str
    digest: str
    imports: tuple[str, ...]  # modules
    names: tuple[str, ...]  # imported from them: modules, too, or what they define


class CodeReader:
    """A reader of a repository's files, each read once; digests are cached in .dvc/tmp between processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cache = self._read_cache()
        self._known: dict[str, _Source] = {}
        self._found: dict[str, list[str]] = {}
        self._files: dict[str, list[str]] = {}
        self._added = False

    def files(self, script: str) -> dict[str, str]:
        """Return {file: digest} of all files that decide the bytes `script` writes, sorted by name.

        Args:
            script: a script, or a module in RECORDED_APART.

        Raises:
            CapasError: a file is missing, or is not Python.
        """
        without = frozenset((*DECIDES_NO_BYTE, *RECORDED_APART)) - {script}
        modules = self._closure(script, without)
        found = {name: self._source(name).digest for name in modules}
        for folder in self._folders(modules):
            for file in _data_files(self._root / folder):
                content = file.read_bytes()
                found[file.relative_to(self._root).as_posix()] = _sha256(content)
        return dict(sorted(found.items()))

    def _folders(self, modules: set[str]) -> set[PurePosixPath]:
        """Return the folders of the modules, and those of packages that are imported themselves."""
        loose = {
            PurePosixPath(name).parent for name in modules if not name.endswith("/__init__.py")
        }
        sources = map(self._source, modules)
        dotted = {name for source in sources for name in (*source.imports, *source.names)}
        last = (files[-1] for name in dotted if (files := self._files_of(name)))
        return (loose | {PurePosixPath(file).parent for file in last}) - {PurePosixPath(PACKAGE)}

    def covered(self, script: str) -> set[str]:
        """Return all modules that `script` may import, whether or not its digest covers them."""
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

    def _imported(self, name: str) -> list[str]:
        """Return the files that a file imports, and the `__init__.py` of each package on the way.

        Raises:
            CapasError: it imports a module of this package that does not exist.
        """
        if name not in self._found:
            source = self._source(name)
            modules = {module: self._files_of(module) for module in source.imports}
            here = (self._root / PACKAGE).is_dir()  # the package may be installed elsewhere
            missing = [m for m, files in modules.items() if here and not files and _is_own(m)]
            if missing:
                raise CapasError(
                    f"{name} imports {missing[0]}, which does not exist. If git does not have the file "
                    "yet: a copy of the repository, as for `dvc exp run --temp`, holds what git has, so run "
                    f"`git add {missing[0].replace('.', '/')}.py`"
                )
            names = (self._files_of(found) for found in source.names)
            self._found[name] = [file for files in (*modules.values(), *names) for file in files]
        return self._found[name]

    def _files_of(self, dotted: str) -> list[str]:
        """Return the files of a module and of the packages on the way; none if it is not a file here.

        Scripts can import what lies beside them, in stages/.
        """
        if dotted not in self._files:
            self._files[dotted] = self._found_files(dotted)
        return self._files[dotted]

    def _found_files(self, dotted: str) -> list[str]:
        parts = dotted.split(".") if _is_own(dotted) else [STAGES, *dotted.split(".")]
        found: list[str] = []
        for end in range(1 if _is_own(dotted) else 2, len(parts) + 1):
            path = "/".join(parts[:end])
            here = [f for f in (f"{path}.py", f"{path}/__init__.py") if (self._root / f).is_file()]
            if not here and not (self._root / path).is_dir():
                return []
            found += here
        return found

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
        except (SyntaxError, ValueError) as error:  # ValueError: null bytes, before Python 3.12
            line = getattr(error, "lineno", None)
            where = name if line is None else f"{name}, line {line}"
            raise CapasError(
                f"{where} is not valid Python: {getattr(error, 'msg', error)}"
            ) from None
        imports, names = _imports(tree, name)
        self._cache[name] = _Source(key, _sha256(serialize(tree).encode()), imports, names)
        self._added = True
        return self._cache[name]

    def _read_cache(self) -> dict[str, _Source]:
        try:
            found = json.loads((self._root / _CACHE).read_text(encoding="utf-8"))
            if found["version"] != _version():
                return {}
            return {
                name: _Source(content, digest, tuple(imports), tuple(names))
                for name, (content, digest, imports, names) in found["files"].items()
            }
        except (OSError, ValueError, LookupError, TypeError):
            return {}  # another version, or half-written: the cache is rebuilt

    def _write_cache(self) -> None:
        if not self._added:
            return
        files = {n: [s.content, s.digest, s.imports, s.names] for n, s in self._cache.items()}
        with suppress(OSError):  # a folder that cannot be written to only costs time
            write_whole(self._root / _CACHE, json.dumps({"version": _version(), "files": files}))
        self._added = False


@cache
def _version() -> str:
    """Return the digest of this module: another serialization must not meet digests of before."""
    return _sha256(Path(__file__).read_bytes())


def _data_files(folder: Path) -> Iterator[Path]:
    """Yield the data files in a folder of modules, and in folders below it that hold no modules."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or is_left_over(entry.name) or entry.name == COMPILED:
            continue
        if entry.is_dir() and not any(entry.rglob("*.py")):
            yield from _data_files(entry)
        elif entry.is_file() and entry.suffix != ".py":
            yield entry


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
    scripts = (
        file.relative_to(root).as_posix()
        for file in sorted((root / STAGES).glob("*.py"))
        if file.is_file() and not file.name.startswith(".")
    )
    return {
        Path(script).stem: digest_of(reader.files(script))
        for script in scripts
        if _RUNNER in reader.imported(script)
    }


def dump(found: Mapping[str, str]) -> str:
    """Return code.yaml as text."""
    lines = [
        f'{name if name.isidentifier() else json.dumps(name)}: "{value}"'
        for name, value in found.items()
    ]
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


def check_declared(specs: Iterable[StageSpec], found: Mapping[str, str]) -> None:
    """Check that each stage whose code has a digest declares it: an edit would not rerun the stage otherwise.

    Args:
        found: {script: digest}, as `digests` returns it.

    Raises:
        CapasError: a stage in dvc.yaml does not.
    """
    for spec in specs:
        by_folder = {PACKAGE, STAGES} <= set(spec.deps)  # compose
        if name_of(spec) in found and CODE not in spec.params and not by_folder:
            raise CapasError(
                f"dvc.yaml: the stage '{spec.name}' does not declare its code, so no edit of it would rerun "
                f"the stage. Add `- {CODE}: [{name_of(spec)}]` to its params"
            )


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
    """Check that the stage's digest covers every module of the repository that this process has loaded.

    Only a process that runs the stage's own script is checked.

    Raises:
        CapasError: a module is not covered, because the code imports it without an import statement.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    script = root / script_of(spec)
    if not _is_declared(spec) or main is None or Path(main).resolve() != script.resolve():
        return
    loaded = _loaded(root)
    loaded -= {
        name for name in loaded for dep in spec.deps if PurePosixPath(name).is_relative_to(dep)
    }
    if unseen := sorted(loaded - reader.covered(script_of(spec))):
        raise CapasError(
            f"the stage '{spec.name}' loaded {', '.join(unseen)}, which its digest in {CODE} does not cover. "
            "Import the module with an import statement, from capas/ or stages/"
        )


def _loaded(root: Path) -> set[str]:
    """Return the modules of the repository that this process has loaded; not those in `.venv`, say."""
    home, real, found = os.path.realpath(root), cache(os.path.realpath), set()
    for module in list(sys.modules.values()):
        folder, name = os.path.split(getattr(module, "__file__", None) or os.devnull)
        if name.endswith(".py") and real(folder).startswith(home):
            path = Path(real(folder), name)
            # torch has modules whose file is a name alone
            if path.is_relative_to(home) and path.is_file():
                found.add(path.relative_to(home))
    return {path.as_posix() for path in found if not _is_installed(path)}


def _is_installed(path: Path) -> bool:
    return any(part.startswith(".") or part == "site-packages" for part in path.parts)


def _is_declared(spec: StageSpec) -> bool:
    keys = spec.params.get(CODE)
    if keys is None:
        return False  # see `check_declared`
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
    parts: list[str] = []
    waiting: list[object] = [node]  # a _Text is written as it is
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Text):
            parts.append(item)
        elif isinstance(item, ast.AST):
            fields = ((name, _shown(item, name)) for name in item._fields if name not in _NO_VALUE)
            shown = [(name, value) for name, value in fields if value not in (None, [])]
            written = [(_Text(f"{' ' * (i > 0)}{n}="), v) for i, (n, v) in enumerate(shown)]
            inner = [piece for pair in written for piece in pair]
            waiting += reversed([_Text(f"({type(item).__name__} "), *inner, _Text(")")])
        elif isinstance(item, list):
            separated = [piece for value in item for piece in (_Text(","), value)][1:]
            waiting += reversed([_Text("["), *separated, _Text("]")])
        else:
            parts.append(ascii(item))
    return "".join(parts)


class _Text(str):
    """A part of the serialized text, not a value of the tree."""

    __slots__ = ()


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
        return [inner for argument in node.args for inner in _without_text(argument)]
    return value


def _without_text(argument: ast.expr) -> list[ast.expr]:
    """Return what counts of a log line's argument: of an f-string, the values in it."""
    if isinstance(argument, ast.JoinedStr):
        return [value for value in argument.values if not _is_text(value)]
    return [] if _is_text(argument) else [argument]


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
        and function.attr in _LEVELS
        and isinstance(function.value, ast.Name)
        and function.value.id in _LOGGERS
    )


def _calls(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _imports(tree: ast.AST, file: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the dotted modules that a file imports, and the names, maybe modules, that it takes of them."""
    modules, names = set(), set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom):
            module = _absolute(node, file)
            modules.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if _MODULE.fullmatch(node.value) else set()
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return tuple(sorted(modules)), tuple(sorted(names))


def _is_own(dotted: str) -> bool:
    return dotted.partition(".")[0] == PACKAGE


def _absolute(node: ast.ImportFrom, file: str) -> str:
    """Return the absolute name of an imported module, also for `from . import x`."""
    if not node.level:
        return node.module or ""
    folders = PurePosixPath(file).parent.parts
    base = folders[: len(folders) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
