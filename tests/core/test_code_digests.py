"""The digests of code.yaml: what they cover, what changes them, and what a stage does with them."""

import ast
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from dvc_yaml import NAMES, imported_modules, script
from workspace import ENVIRONMENT, REPOSITORY

from capas.core import codediff
from capas.core.code_digests import (
    CODE,
    DECIDES_NO_BYTE,
    RECORDED_APART,
    CodeReader,
    check_code,
    check_declared,
    digest_of,
    digests,
    dump,
    serialize,
)
from capas.core.dag import StageSpec
from capas.core.errors import CapasError
from capas.workspace.due import describe, due

STAGES = [name for name in NAMES if name != "compose"]
SCRIPTS = {"one": "first", "two": "second"}  # of the stages of `project`
CODE_OF_ALL = """
import math
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from capas.x import X
def f(x: int) -> float:
    if x < 0:
        raise CapasError(f"{x} is negative")
    log.info("root of %d", x)
    return math.sqrt(x)
"""


def text_of(code: str) -> str:
    return serialize(ast.parse(code))


def test_the_serialization_is_exactly_this_on_every_version_of_python() -> None:
    assert text_of('x = f"{a:{w}}é" + "\\N{BOX DRAWINGS LIGHT HORIZONTAL}" * -1') == (
        "(Module body=[(Assign targets=[(Name id='x')] value=(BinOp left="
        "(JoinedStr values=[(FormattedValue value=(Name id='a') conversion=-1 format_spec="
        "(JoinedStr values=[(FormattedValue value=(Name id='w') conversion=-1)])),"
        "(Constant value='\\xe9')]) op=(Add ) right=(BinOp left=(Constant value='\\u2500') "
        "op=(Mult ) right=(UnaryOp op=(USub ) operand=(Constant value=1)))))])"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import math", "import math  # a comment"),
        ("def f(x: int) -> float:", 'def f(x: int) -> float:\n    """Return the root."""'),
        ("    return math.sqrt(x)", "    return math.sqrt(\n        x,\n    )"),
        ("    from capas.x import X", "    from capas.y import Y"),
        ('f"{x} is negative"', 'f"a root of {x}?"'),
        ("root of %d", "the root of %d"),
    ],
)
def test_what_changes_no_byte_does_not_count(old: str, new: str) -> None:
    assert CODE_OF_ALL.count(old) == 1
    assert text_of(CODE_OF_ALL.replace(old, new)) == text_of(CODE_OF_ALL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x < 0", "x < 1"),
        ("sqrt", "cbrt"),
        ("x: int", "y: int"),
        ('raise CapasError(f"{x} is negative")', "raise"),
        ("raise CapasError", "raise ValueError"),
        ('raise CapasError(f"{x} is negative")', "return 0.0"),
        ('"root of %d", x', '"root of %d", pop(x)'),
        ("log.info", "rows.append"),
        ("import math\n", "import math\nfrom capas import z\n"),
        ("TYPE_CHECKING:", "True:"),
        ("return math.sqrt(x)", 'return math.sqrt(x) if "a" else 0.0'),
    ],
)
def test_what_may_change_a_byte_counts(old: str, new: str) -> None:
    assert CODE_OF_ALL.count(old) == 1
    assert text_of(CODE_OF_ALL.replace(old, new)) != text_of(CODE_OF_ALL)


def test_no_text_of_an_error_reaches_an_output() -> None:
    """Such texts do not count, so a stage may only pass them on, log them or end with them."""
    ends = (
        "raise ",
        "log.",
        "sys.exit(",
        "sys.stdout.write(",
        "return UNUSABLE if isinstance(error,",
    )
    kept = {}
    for file in sorted({file for name in STAGES for file in imported_modules(script(name))}):
        for node in ast.walk(ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler) or not node.name or not node.type:
                continue
            if "CapasError" in ast.unparse(node.type):
                used = (ast.unparse(line) for line in _lines_with(node, node.name))
                kept[f"{file}:{node.lineno}"] = [u for u in used if not u.startswith(ends)]
    assert len(kept) > 8
    assert {place: lines for place, lines in kept.items() if lines} == {}


def _lines_with(handler: ast.ExceptHandler, name: str) -> list[ast.stmt]:
    """The simple statements that read a name."""
    return [
        line
        for line in ast.walk(handler)
        if isinstance(line, ast.stmt)
        and not hasattr(line, "body")
        and name in {node.id for node in ast.walk(line) if isinstance(node, ast.Name)}
    ]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package, two scripts of which one imports inside a function, and a template beside a module."""
    files = {
        "capas/__init__.py": '"""Layers."""\n',
        "capas/one.py": "from capas.report import two\n",
        "capas/lazy.py": "x = 1\n",
        "capas/unused.py": "x = 1\n",
        "capas/core/__init__.py": "",
        "capas/core/stage.py": "def run(): ...\n",
        "stages/tool.py": "from capas import unused\n",  # no stage's
        "capas/core/errors.py": "x = 1\n",
        "capas/report/__init__.py": "",
        "capas/report/two.py": "from . import three\n",
        "capas/report/three.py": "from ..one import two\n",  # a circle
        "capas/report/page.jinja": "{{ x }}\n",
        "capas/report/.DS_Store": "",
        "stages/first.py": "from capas.one import f\nfrom capas.core import errors, stage\n",
        "stages/second.py": "from capas.core import stage\ndef main():\n    from capas import lazy\n",
        "dvc.yaml": yaml.safe_dump(
            {
                "stages": {
                    name: {
                        "cmd": f"python stages/{script}.py",
                        "params": [{CODE: [script]}],
                        "outs": [name],
                    }
                    for name, script in SCRIPTS.items()
                }
            }
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_digest_covers_imports_of_imports_and_the_data_beside_them(project: Path) -> None:
    reader = CodeReader(project)
    page = ["__init__", "three", "two"]
    assert list(reader.files("stages/first.py")) == [
        *(f"capas/{name}.py" for name in ("__init__", "core/__init__", "core/stage", "one")),
        *(f"capas/report/{name}.py" for name in page[:1]),
        "capas/report/page.jinja",
        *(f"capas/report/{name}.py" for name in page[1:]),
        "stages/first.py",
    ]
    assert reader.covered("stages/first.py") == {
        *(name for name in reader.files("stages/first.py") if name.endswith(".py")),
        "capas/core/errors.py",
    }
    names = ("__init__", "core/__init__", "core/stage", "lazy")
    second = [*(f"capas/{name}.py" for name in names), "stages/second.py"]
    assert list(reader.files("stages/second.py")) == second


@pytest.mark.parametrize(
    ("file", "text", "changed"),
    [
        ("capas/report/three.py", "from ..one import two\nx = 1\n", {"first"}),
        ("capas/report/page.jinja", "{{ y }}\n", {"first"}),
        ("capas/report/new.css", "", {"first"}),
        ("capas/report/new.py", "", set()),
        ("capas/lazy.py", "x = 2\n", {"second"}),
        ("capas/lazy.py", "x  =  1  # a comment\n", set()),
        ("capas/core/errors.py", "x = 2\n", set()),
        ("capas/unused.py", "x = 2\n", set()),
        ("capas/__init__.py", "x = 1\n", {"first", "second"}),
        ("stages/first.py", "from capas import unused\nfrom capas.core import stage\n", {"first"}),
        ("stages/tool.py", "from capas.core import stage\n", {"tool"}),
        *(
            (f"capas/report/{name}", "left over", set())
            for name in (
                ".#two.py",
                "#two.py#",
                ".two.py.swo",
                "two.py.orig",
                "two.py.rej",
                "._two.py",
            )
        ),
        *(
            (f"capas/report/{name}", "left over", set())
            for name in (".nfs0001", ".gitkeep", "4913")
        ),
    ],
)
def test_an_edit_changes_the_digests_of_those_that_import_it(
    project: Path, file: str, text: str, changed: set[str]
) -> None:
    before = digests(project)
    (project / file).write_text(text)
    after = digests(project)  # with the cache of the first reading
    assert {name for name in after if before.get(name) != after[name]} == changed
    shutil.rmtree(project / ".dvc")
    assert digests(project) == after


HIDDEN_IMPORTS = {
    "a module beside the script": ("from helper import x\n", "stages/helper.py"),
    "one in a folder beside it": ("import help.er\n", "stages/help/er.py"),
    "a module that is named": ("X = 'capas.core.started'\n", "capas/core/started.py"),
    "a relative one": ("from .core.other import x\n", "capas/core/other.py"),
    "data of a package": ("from capas.words import x\n", "capas/words/a.txt"),
    "data in a folder": ("from capas.report import two\n", "capas/report/texts/deep/a.txt"),
    "data beside the script": ("", "stages/names.txt"),
}


@pytest.mark.parametrize(("line", "file"), HIDDEN_IMPORTS.values(), ids=HIDDEN_IMPORTS)
def test_whatever_a_script_reaches_is_covered(project: Path, line: str, file: str) -> None:
    (project / "capas/words").mkdir()
    (project / "capas/words/__init__.py").write_text("x = 1\n")
    (project / file).parent.mkdir(parents=True, exist_ok=True)
    (project / file).write_text("")
    script = project / ("capas/lazy.py" if line.startswith("from .") else "stages/second.py")
    script.write_text(f"{line}{(project / 'stages/second.py').read_text()}")
    before = digests(project)["second"]
    (project / file).write_text("x = 2\n")
    assert digests(project)["second"] != before


def test_a_module_that_is_not_there_is_named(project: Path) -> None:
    (project / "capas/lazy.py").write_text("from capas.report.fresh import x\n")
    with pytest.raises(
        CapasError, match=r"lazy\.py imports capas\.report\.fresh.*`git add capas/rep"
    ):
        digests(project)


def test_a_file_that_nests_deeply_is_read(project: Path) -> None:
    branches = "".join(f"elif x == {i}:\n    y = {i}\n" for i in range(400))
    (project / "capas/lazy.py").write_text(f"x = 1\nif x == -1:\n    y = 0\n{branches}")
    assert text_of((project / "capas/lazy.py").read_text()).count("(Compare ") == 401
    assert digests(project).keys() == {"first", "second"}


def test_files_that_are_no_scripts_are_passed_over(project: Path) -> None:
    before = digests(project)
    (project / "stages/old.py").mkdir()
    (project / "stages/._first.py").write_bytes(b"\0\0")
    (project / "stages/.#second.py").symlink_to("me@host:1")
    assert digests(project) == before
    (project / "stages/odd: name.py").write_text("from capas.core import stage\n")
    assert yaml.safe_load(dump(digests(project))).keys() == {"first", "odd: name", "second"}


def test_a_cache_that_cannot_be_written_costs_time_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(project)
    shutil.rmtree(project / ".dvc")

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("capas.core.code_digests.write_whole", refuse)
    assert digests(project) == before
    assert not (project / ".dvc").exists()


def test_processes_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    """Each writes to a file of its own until it is whole."""
    code = (
        "import sys; from pathlib import Path; from capas.core.files import write_whole\n"
        "for _ in range(400): write_whole(Path(sys.argv[1]), 'x' * 1000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "one.json")]
    running = [subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["one.json"]


def test_a_stage_that_does_not_declare_its_code_is_refused(project: Path) -> None:
    specs = StageSpec.read_all(project)
    check_declared(specs.values(), digests(project))
    bare = replace(specs["two"], params={})
    message = r"'two' does not declare its code.*Add `- code\.yaml: \[second\]` to its params"
    with pytest.raises(CapasError, match=message):
        check_declared([bare], digests(project))
    check_declared([replace(bare, deps=("capas", "stages"))], digests(project))


def test_only_an_edited_file_is_parsed_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    parse = ast.parse

    def count(content: bytes, name: str = "", *more: str) -> ast.AST:
        parsed.append(name)
        return parse(content, name, *more)

    def read() -> list[str]:
        parsed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(ast, "parse", count)
            digests(project)
            CodeReader(project).covered("stages/first.py")
        return list(parsed)

    assert len(read()) > 2
    for edited in ("capas/lazy.py", "capas/report/three.py"):
        (project / edited).write_text("x = 'another'\n")
        assert read() == [edited]
        assert read() == []


def test_a_damaged_cache_is_made_again(project: Path) -> None:
    before = digests(project)
    for text in ('{"version": 2, "files": {"a": []}}', "{", "[]", '{"version": 0, "files": {}}'):
        (project / ".dvc/tmp/code.json").write_text(text)
        assert digests(project) == before


def test_bad_code_is_named(project: Path) -> None:
    (project / "capas/lazy.py").write_text("x = (\n")
    with pytest.raises(
        CapasError, match=r"capas/lazy\.py, line 1 is not valid Python: '\(' was never"
    ):
        digests(project)
    (project / "stages/second.py").unlink()
    with pytest.raises(CapasError, match=r"stages/second\.py is missing"):
        CodeReader(project).files("stages/second.py")
    (project / "stages/first.py").write_text("x = 1\n", encoding="utf-16")
    with pytest.raises(
        CapasError, match=r"stages/first\.py(, line \d)? is not valid Python: .*null byte"
    ):
        digests(project)


def test_a_stage_declares_its_own_digest(project: Path) -> None:
    pipeline = yaml.safe_load((project / "dvc.yaml").read_text())
    pipeline["stages"]["two"]["params"] = [{CODE: ["first"]}]
    (project / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    (project / CODE).write_text(dump(digests(project)))
    said = r"'two' declares code\.yaml: \['first'\]; it must be \[second\]"
    with pytest.raises(CapasError, match=said):
        check_code(StageSpec.read("two", project), project, CodeReader(project))


def test_a_stage_whose_code_was_edited_after_compose_is_refused(project: Path) -> None:
    (project / CODE).write_text(dump(digests(project)))
    second = StageSpec.read("two", project)
    check_code(second, project, CodeReader(project))
    (project / "capas/lazy.py").write_text("x = 2\n")
    with pytest.raises(CapasError, match="the code of the stage 'two' was edited after compose"):
        check_code(second, project, CodeReader(project))


RUN = """
import importlib
from capas.core.stage import run
def main(params, stage):
    {line}
    stage.out("made").write_text("x")
if __name__ == "__main__":
    run("only", main)
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from capas.core import cgroups", ""),
        (
            'importlib.import_module("capas.core" + ".cgroups")',
            "the stage 'only' loaded capas/core/cgroups.py, which its digest in code.yaml does not cover",
        ),
        (
            'open("capas/core/params.py", "a").write("x = 1\\n")',
            "changed while the stage was running: capas/core/params.py",
        ),
        ('open("capas/core/params.py", "a").write("# a comment\\n")', ""),
    ],
)
def test_a_stage_ends_as_the_code_that_its_digest_covers(
    tmp_path: Path, line: str, said: str
) -> None:
    shutil.copytree(
        REPOSITORY / "capas", tmp_path / "capas", ignore=shutil.ignore_patterns("__pyc*")
    )
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/only.py").write_text(RUN.format(line=line))
    (tmp_path / "dvc.yaml").write_text(
        "stages: {only: {cmd: python stages/only.py, params: ['code.yaml': [only]], outs: [made]}}\n"
    )
    (tmp_path / CODE).write_text(dump(digests(tmp_path)))
    command = [sys.executable, "stages/only.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert said in done.stderr
    assert (done.returncode, (tmp_path / "made").exists()) == ((1, False) if said else (0, True))


def test_code_yaml_is_of_this_code() -> None:
    assert (REPOSITORY / CODE).read_text() == dump(digests(REPOSITORY))


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("capas/training/trainer.py", {"train"}),
        ("capas/dataset/splits.py", {"fetch"}),
        ("capas/chat/audit.py", {"format"}),
        ("capas/evaluation/overlap_metrics.py", {"evaluate_base", "evaluate", "sample"}),
        ("capas/report/plots.py", {"report"}),
        ("capas/report/style.css", {"report"}),
        ("capas/report/mask/es.yaml", {"format", "report"}),
        ("capas/tracking/store.py", {"publish"}),
        ("capas/evaluation/generation.py", {"evaluate_base", "evaluate", "sample", "publish"}),
        ("capas/training/memory.py", set()),
        ("capas/compare/words.py", set()),
        ("capas/core/stage.py", set(STAGES)),
    ],
)
def test_an_edit_reruns_the_stages_that_one_expects(file: str, stages: set[str]) -> None:
    reader = CodeReader(REPOSITORY)
    assert {name for name in STAGES if file in reader.files(script(name))} == stages


def test_code_recorded_apart_is_in_a_dep_of_the_stages_that_import_it() -> None:
    reader, specs = CodeReader(REPOSITORY), StageSpec.read_all(REPOSITORY)
    for module, file in RECORDED_APART.items():
        using = {name for name in STAGES if module in reader.covered(script(name))}
        assert using == {"train"} and all(file in specs[name].deps for name in using)
        assert module in reader.files(module)
        assert not any(module in reader.files(script(name)) for name in STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_digest_covers_what_another_reading_of_the_imports_finds(name: str) -> None:
    """Which takes what type checkers alone import for an import, and leaves out the packages' own files."""
    reader = CodeReader(REPOSITORY)
    modules = {f for f in reader.covered(script(name)) if not f.endswith("/__init__.py")}
    assert modules - imported_modules(script(name)) == set()
    typed = imported_modules(script(name)) - modules - {"capas/__init__.py"}
    assert all(
        f"import {Path(f).stem}" in _typed(name) or f in _modules(_typed(name)) for f in typed
    )


def _typed(name: str) -> str:
    """What stands below TYPE_CHECKING in the files that a stage imports."""
    trees = (
        ast.parse((REPOSITORY / f).read_text(encoding="utf-8"))
        for f in imported_modules(script(name))
    )
    blocks = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.If))
    return "\n".join(
        ast.unparse(line)
        for b in blocks
        if ast.unparse(b.test) == "TYPE_CHECKING"
        for line in b.body
    )


def _modules(imports: str) -> set[str]:
    """The files that these lines, and whatever they import, import."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(imports)):
        if isinstance(node, ast.ImportFrom) and node.module:
            file = f"{node.module.replace('.', '/')}.py"
            if (REPOSITORY / file).exists():
                found |= imported_modules(file)
    return found


def test_modules_that_decide_no_byte_are_imported_by_some_stage() -> None:
    used = {file for name in STAGES for file in CodeReader(REPOSITORY).covered(script(name))}
    assert set(DECIDES_NO_BYTE) - used == set()


@pytest.fixture
def committed(project: Path) -> Callable[..., str]:
    """`project` in git, its stages recorded in dvc.lock with their digests; runs git there."""

    def git(*words: str) -> str:
        env = {**ENVIRONMENT, "GIT_CONFIG_GLOBAL": "/dev/null"}
        done = subprocess.run(
            ["git", *words], cwd=project, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout

    found = digests(project)
    (project / CODE).write_text(dump(found))
    stages = {
        name: {
            "cmd": f"python stages/{script}.py",
            "params": {CODE: {script: found[script]}},
            "outs": [{"path": name, "md5": "0" * 32}],
        }
        for name, script in SCRIPTS.items()
    }
    (project / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    for name in SCRIPTS:
        (project / name).touch()
    (project / ".gitignore").write_text("/.dvc\n/one\n/two\n")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "first")):
        git(*words)
    return git


def test_due_names_the_files_that_were_edited(project: Path, committed: Callable[..., str]) -> None:
    assert due(project) == {}
    (project / "capas/report/three.py").write_text("from ..one import two\nx = 2\n")
    (project / "capas/one.py").write_text("from capas.report import two  # a comment\n")
    assert due(project) == {"one": ["capas/report/three.py"]}
    (project / CODE).write_text(dump(digests(project)))
    committed("commit", "-q", "-a", "-m", "second")  # dvc.lock has the code of the one before
    (project / "stages/second.py").write_text("from capas.core import stage\n")
    assert due(project) == {
        "one": ["capas/report/three.py"],
        "two": ["stages/second.py"],
    }
    assert "  one              capas/report/three.py\n" in describe(project)
    lock = (project / "dvc.lock").read_text()
    (project / "dvc.lock").write_text(lock.replace("first: ", "first: x"))  # a digest nobody knows
    assert due(project)["one"] == ["its code"]


def test_two_recorded_states_are_compared_file_by_file(
    project: Path, committed: Callable[..., str]
) -> None:
    first, before = committed("rev-parse", "HEAD").strip(), digests(project)["first"]
    (project / "capas/one.py").write_text("from capas.report import two\nx = 1\n")
    (project / CODE).write_text(dump(digests(project)))
    committed("commit", "-q", "-a", "-m", "second")
    pairs = {"first": (before, digests(project)["first"])}
    assert codediff.between_digests(project, pairs, [None, None]) == ["capas/one.py"]
    assert codediff.between_digests(project, pairs, [first, None]) == ["capas/one.py"]
    unknown = {"first": ("0" * 16, "1" * 16)}
    assert codediff.between_digests(project, unknown, [None, first]) == []
    assert codediff.between_digests(project, unknown, [None, "f" * 40]) == []
    with codediff.exported(project, first) as folder:
        reader = CodeReader(folder)
        assert digest_of(reader.files("stages/first.py")) == before


def test_a_project_in_a_folder_of_a_repository_is_compared_as_it_was_stored(
    project: Path, committed: Callable[..., str]
) -> None:
    """git archives from the top folder only, and would convert line ends if it is told to."""
    (project / "ml").mkdir()
    for name in ("capas", "stages", CODE, "dvc.yaml", "dvc.lock"):
        committed("mv", name, f"ml/{name}")
    committed("commit", "-q", "-a", "-m", "moved")
    committed("config", "core.autocrlf", "true")
    folder = project / "ml"
    for name in SCRIPTS:
        (folder / name).touch()
    (folder / "capas/lazy.py").write_text("x = 2\n")
    assert due(folder)["two"] == ["capas/lazy.py"]


def test_an_archive_is_read_without_the_filters_of_a_newer_python(
    project: Path, committed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tarfile, "data_filter")
    with codediff.exported(project, committed("rev-parse", "HEAD").strip()) as folder:
        assert (folder / "stages/first.py").read_text() == (project / "stages/first.py").read_text()
