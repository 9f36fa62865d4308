"""dvc.yaml against the code: files, imports, params, environment."""

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_yaml import NAMES, PIPELINE, imported_modules, script, spec
from workspace import REPOSITORY

from capas.core.dag import LEFT_BY_EDITORS, StageSpec, input_key, md5, recorded, recorded_key
from capas.core.errors import CapasError
from capas.core.params import flatten


def read_params(file: str) -> set[str]:
    """'lora', 'dataset.max_length': what the code reads of an object named params."""
    chains = set()
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id == "params":
            chains.add(".".join(p for p in parts if p != "without"))
    return {c for c in chains if c}


def covers(one: str, other: str) -> bool:
    return one == other or other.startswith(one + ".")


@pytest.mark.parametrize("readme", ["README.md", "README.es.md"])
def test_the_stages_are_those_of_the_readme(readme: str) -> None:
    assert sorted(PIPELINE) == sorted(NAMES)
    assert all(len(entry["desc"]) > 20 for entry in PIPELINE.values())
    rows = re.findall(r"^\| (`.*?`) \|", (REPOSITORY / readme).read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(r for r in rows if "/" not in r))) == sorted(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_declares_the_digest_of_its_code_and_no_module(name: str) -> None:
    """compose, which computes the digests, reads the folders as they are."""
    folders = {"capas", "stages"} if name == "compose" else set()
    assert {dep for dep in spec(name).deps if dep.startswith(("capas", "stages", "dvc"))} == folders
    assert spec(name).params.get("code.yaml") == (
        None if name == "compose" else [Path(script(name)).stem]
    )
    assert list(spec(name).deps) == sorted(spec(name).deps)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("compose", "report")])
def test_a_stage_reads_the_params_that_it_declares(name: str) -> None:
    # publish hands its params on whole
    files = [script(name), *(["capas/use/mlflow_model.py"] if name == "publish" else [])]
    declared, read = set(spec(name).keys), set[str]().union(*map(read_params, files))
    assert declared - {d for d in declared for r in read if covers(d, r) or covers(r, d)} == set()
    # A script of two stages: what only the other reads is refused at run time, see capas.core.params.
    alike = [other for other in NAMES if script(other) == script(name)]
    of_both = {d for other in alike for d in spec(other).keys}
    assert read - {r for r in read for d in of_both if covers(d, r) or covers(r, d)} == set()


def test_every_configuration_key_is_declared_by_a_stage_that_computes() -> None:
    """The report shows all of them, which does not count; a few are read by compose alone."""
    computing = [name for name in NAMES if name != "report"]
    declared = {key for name in computing for key in spec(name).keys}
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    leaves = {f"{g}.{k}" for g, v in params.items() if isinstance(v, dict) for k in v} | {"seed"}
    unread = {key for key in leaves if not any(covers(d, key) for d in declared)}
    publishing = {"quantization", "tracking"}  # publish declares them whole: it costs nothing
    presets = {f"{g}.preset" for g, v in params.items() if isinstance(v, dict)}
    presets -= {f"{group}.preset" for group in publishing}
    composed = {"seed", "chat_template.contrast", "hardware.dtype"}
    composed |= {"model.cpu_instruction_set", "model.cpu_num_threads"}  # copies of others
    assert unread == presets | composed


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("compose", "report")])
def test_the_packages_that_a_stage_imports_decide_its_bytes(name: str) -> None:
    """`report` declares all; publish writes no byte that DVC keeps. Imported is not yet used."""
    unused = {"fetch_tokenizer": {"tokenizers"}, "quantize": {"peft"}, "evaluate_base": {"peft"}}
    unused["train"] = {"rouge-score", "sacrebleu"}  # in data/composed/checkpoint_metric.json
    recorded_packages = set(yaml.safe_load((REPOSITORY / "environment.yaml").read_text()))
    imported = {
        module
        for file in imported_modules(script(name))
        for node in ast.walk(ast.parse((REPOSITORY / file).read_text(encoding="utf-8")))
        for module in (name.replace("_", "-") for name in _packages_of(node))
    }
    needed = imported & recorded_packages if name != "publish" else set()
    declared = set(spec(name).params.get("environment.yaml", []))
    assert needed - declared == unused.get(name, set())


def _packages_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module.split(".")[0]]
    return [a.name.split(".")[0] for a in node.names] if isinstance(node, ast.Import) else []


def test_every_dep_is_a_file_or_an_output() -> None:
    outs = {out for name in NAMES for out in spec(name).outs}
    for name in NAMES:
        lost = [d for d in spec(name).deps if d not in outs and not (REPOSITORY / d).exists()]
        assert lost == [], name


def test_the_mask_needs_no_weights() -> None:
    makers = {out: name for name in NAMES for out in spec(name).outs}
    todo, seen = ["format"], set()
    while todo:
        current = todo.pop()
        seen.add(current)
        todo += [makers[dep] for dep in spec(current).deps if dep in makers]
    assert seen == {"format", "tokenize", "fetch", "fetch_tokenizer", "compose"}


def test_packages_hold_nothing_but_a_docstring() -> None:
    """An import of `capas.chat.format` runs `capas/chat/__init__.py`, which is no dep of any stage.

    capas/__init__.py alone says more: where its modules are.
    """
    packages = sorted((REPOSITORY / "capas").glob("*/__init__.py"))
    assert len(packages) == 14
    assert all(len(ast.parse(file.read_text()).body) == 1 for file in packages)


def test_no_script_imports_a_script() -> None:
    files = sorted((REPOSITORY / "stages").glob("*.py"))
    assert len(files) >= 13
    assert not [f.name for f in files if "from stages" in f.read_text(encoding="utf-8")]


def test_a_key_before_a_run_is_the_key_that_dvc_records_after_it(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  one:\n    cmd: x\n    deps: [a.txt]\n    params: [trainer, seed]\n    outs: [b]\n"
    )
    (tmp_path / "params.yaml").write_text("trainer: {adam_epsilon: 1.0e-08}\nseed: 1\n")
    (tmp_path / "a.txt").write_text("hello")
    entry = {
        "cmd": "x",
        "deps": [{"path": "a.txt", "md5": "5d41402abc4b2a76b9719d911017c592"}],
        "params": {"params.yaml": {"trainer": {"adam_epsilon": 1e-8}, "seed": 1}},
    }
    assert input_key(StageSpec.read("one", tmp_path), tmp_path) == recorded_key(entry)


def test_a_folder_that_no_stage_makes_has_the_hash_that_dvc_gives_it(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  one: {cmd: x, deps: [own], outs: [b]}\n  two: {cmd: y, deps: [b], outs: [c]}\n"
    )
    (tmp_path / "own/Z").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    for name, content in {"a.jsonl": "{}", "Z/ñ b.jsonl": "x", "Z.x": "y"}.items():
        (tmp_path / "own" / name).write_text(content)
    for name in (".DS_Store", "Z/.a.jsonl.swp", "a.jsonl~"):
        (tmp_path / "own" / name).touch()  # DVC does not see them
    md5 = "15713809b671d3961e79800d32c444e8.dir"  # as `dvc add` computed it
    entry = {"cmd": "x", "deps": [{"path": "own", "md5": md5}]}
    assert input_key(StageSpec.read("one", tmp_path), tmp_path) == recorded_key(entry)
    with pytest.raises(CapasError, match=r"b is not in dvc\.lock: an earlier stage has not run"):
        input_key(StageSpec.read("two", tmp_path), tmp_path)


def test_a_clone_has_the_same_bytes_whatever_git_is_told_of_line_ends() -> None:
    files = [
        "capas/core/code_digests.py",
        "capas/report/en.yaml",
        "conf/config.yaml",
        "Makefile",
        "README.md",
    ]
    command = ["git", "-c", "core.autocrlf=true", "check-attr", "eol", "text", "--", *files]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    expected = [line for file in files for line in (f"{file}: eol: lf", f"{file}: text: auto")]
    assert found.stdout.splitlines() == expected


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / ".#open.yaml").symlink_to("me@host:1")
    assert md5(tmp_path).endswith(".dir")  # an editor's lock is passed over
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(CapasError, match=r"gone is a link to nowhere, which does not exist"):
        md5(tmp_path)


def test_families_of_stages_are_passed_over_and_commands_may_be_several(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  each: {foreach: [1, 2], do: {cmd: 'echo ${item}'}}\n"
        "  all: {matrix: {a: [1]}, cmd: 'echo ${item.a}'}\n"
        "  two: {cmd: [echo 1, echo 2]}\n"
    )
    (tmp_path / "dvc.lock").write_text("stages: {two: {cmd: [echo 1, echo 2]}}\n")
    (two,) = StageSpec.read_all(tmp_path).values()
    assert two.cmd == "echo 1\necho 2"
    assert recorded_key(recorded(tmp_path)["two"]) == input_key(two, tmp_path)


def test_what_editors_leave_is_what_dvc_ignores() -> None:
    lines = (REPOSITORY / ".dvcignore").read_text().replace("\\#", "#").splitlines()
    of_editors = lines[1 + next(i for i, line in enumerate(lines) if "editors" in line) :]
    assert list(LEFT_BY_EDITORS) == of_editors


def test_dvcs_way_to_write_a_small_number_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text(
        "stages: {train: {params: {p: {a: 1e-08, b: 2E+3, c: x1e3}}}}"
    )
    assert recorded(tmp_path)["train"]["params"]["p"] == {"a": 1e-8, "b": 2000.0, "c": "x1e3"}


def test_an_unknown_stage_is_refused_by_name() -> None:
    with pytest.raises(CapasError, match="no stage 'tune'; it has: compose"):
        spec("tune")


def test_a_metric_has_one_name_in_all_files() -> None:
    """Of two files with one `loss`, `dvc exp show` makes columns as long as their paths."""
    files = sorted((REPOSITORY / "reports/metrics").glob("*.json"))
    assert len(files) == 5
    names = [name for file in files for name in flatten(json.loads(file.read_text()))]
    assert len(names) == len(set(names))
