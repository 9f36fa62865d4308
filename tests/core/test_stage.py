"""The plumbing round a stage: nothing half-written, nothing undeclared, nothing raced."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from capas.core.dag import StageSpec
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.stage import Stage, _check_read, run

DVC_YAML = """\
stages:
  copy:
    cmd: python copy.py
    deps: [in.txt]
    params: [lora.r, 'environment.yaml': [pyyaml]]
    outs: [out/a.txt, out/b]
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text(DVC_YAML.replace(", 'environment.yaml': [pyyaml]", ""))
    (tmp_path / "params.yaml").write_text("lora: {r: 4, alpha: 8}\nseed: 1\n")
    (tmp_path / "in.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["copy.py"])
    return tmp_path


def copy(params: Params, stage: Stage) -> None:
    stage.out("out/a.txt").write_text(stage.dep("in.txt").read_text() * params.lora.r)
    stage.out("out/b").mkdir()


def failure(main: Callable[[Params, Stage], None]) -> str:
    with pytest.raises(SystemExit) as caught:
        run("copy", main)
    return str(caught.value)


def test_outputs_are_moved_into_place(root: Path) -> None:
    run("copy", copy)
    assert (root / "out/a.txt").read_text() == "hello" * 4
    assert sorted(p.name for p in (root / "out").iterdir()) == ["a.txt", "b"]
    assert (root / "reports/timings/copy.json").exists()


def test_a_stage_that_fails_leaves_the_old_outputs(root: Path) -> None:
    run("copy", copy)

    def die(params: Params, stage: Stage) -> None:
        stage.out("out/a.txt").write_text("half")
        raise CapasError("no luck")

    assert failure(die) == "copy: no luck"
    assert (root / "out/a.txt").read_text() == "hello" * 4


def test_an_undeclared_param_cannot_be_read(root: Path) -> None:
    assert "'lora.alpha' is not declared" in failure(lambda p, s: p.lora.alpha)
    assert "'seed' is not declared" in failure(lambda p, s: p.seed)


def test_undeclared_files_are_refused(root: Path) -> None:
    assert "params.yaml is not declared as dep" in failure(
        lambda p, s: s.dep("params.yaml") and None
    )
    assert "c is not declared as output" in failure(lambda p, s: s.out("c") and None)


def test_an_output_that_was_not_written_is_an_error(root: Path) -> None:
    assert "did not write out/b" in failure(
        lambda p, s: s.out("out/a.txt").write_text("x") and None
    )


def test_a_missing_input_names_the_way_out(root: Path) -> None:
    (root / "in.txt").unlink()
    assert "in.txt is missing because its stage has not run. Run `dvc repro`" in failure(copy)


def test_an_input_edited_meanwhile_is_not_recorded(root: Path) -> None:
    def edit(params: Params, stage: Stage) -> None:
        copy(params, stage)
        (root / "in.txt").write_text("bye")
        (root / "params.yaml").write_text("lora: {r: 5}\n")

    message = failure(edit)
    assert "the params in params.yaml, in.txt" in message
    assert not (root / "out/a.txt").exists()


def test_a_second_process_of_the_same_stage_is_refused(root: Path) -> None:
    def again(params: Params, stage: Stage) -> None:
        run("copy", copy)

    assert f"already running in this workspace (pid {os.getpid()})" in failure(again)


def test_another_package_version_than_recorded_is_refused(root: Path) -> None:
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "environment.yaml").write_text('pyyaml: "1.0"\n')
    message = failure(copy)
    assert "recorded 1.0" in message
    assert "pip install -r requirements.lock" in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_and_a_missing_permission_are_messages(root: Path, number: int) -> None:
    def fail(params: Params, stage: Stage) -> None:
        raise OSError(number, os.strerror(number), "out/a.txt")

    assert failure(fail).startswith(
        f"copy: {os.strerror(number)} (out/a.txt). Nothing was recorded"
    )


@pytest.mark.parametrize(
    "error",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "Error while serializing: I/O error: No space left on device (os error 28)",
    ],
)
def test_a_full_disk_as_torch_and_safetensors_report_it(root: Path, error: str) -> None:
    def fail(params: Params, stage: Stage) -> None:
        raise RuntimeError(error)

    assert failure(fail).startswith("copy: No space left on device")


def test_a_programming_error_keeps_its_traceback(root: Path) -> None:
    def main(params: Params, stage: Stage) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run("copy", main)


def test_checkpoints_belong_to_exactly_these_inputs(root: Path) -> None:
    first = Stage(StageSpec.read("copy", root), root).checkpoints()
    (root / "in.txt").write_text("bye")
    assert Stage(StageSpec.read("copy", root), root).checkpoints() != first


def test_checkpoints_go_once_dvc_has_recorded_the_outputs(root: Path) -> None:
    folders: list[Path] = []

    def main(params: Params, stage: Stage) -> None:
        folders.append(stage.checkpoints())
        copy(params, stage)

    run("copy", main)
    run("copy", copy)
    assert folders[0].exists()  # DVC may have died before it recorded anything
    deps = [{"path": "in.txt", "md5": hashlib.md5(b"hello").hexdigest()}]
    entry = {"cmd": "python copy.py", "deps": deps, "params": {"params.yaml": {"lora.r": 4}}}
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"copy": entry}}))
    run("copy", copy)
    assert not folders[0].exists()
    failure(lambda params, stage: stage.checkpoints() and params.lora.alpha)
    run("copy", copy)
    assert folders[
        0
    ].exists()  # of a forced run that was interrupted: the next one goes on from there


def test_a_timing_names_its_inputs_and_costs_no_result(root: Path) -> None:
    run("copy", copy)
    timing = json.loads((root / "reports/timings/copy.json").read_text())
    assert timing["key"] == Stage(StageSpec.read("copy", root), root).key()
    (root / "reports/timings/copy.json").unlink()
    (root / "reports/timings/copy.json").mkdir()
    run("copy", copy)
    assert (root / "out/a.txt").exists()


def test_params_are_read_only_and_go_straight_through() -> None:
    params = Params({"lora": {"preset": "x", "r": 4}})
    assert dict(**params.lora) == {"preset": "x", "r": 4}
    assert params.lora.without("preset") == {"r": 4}
    with pytest.raises(TypeError):
        params["lora"] = 1  # type: ignore[index]


def test_an_interrupt_is_a_message(root: Path) -> None:
    def interrupt(params: Params, stage: Stage) -> None:
        raise KeyboardInterrupt

    assert failure(interrupt).startswith("copy: stopped. `dvc repro` runs it again")


def test_an_override_that_the_stage_does_not_read_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = {"lora": {"r": 4}, "seed": 1}
    _check_read({"lora": {"r": 8}, "seed": 1}, before, ["lora.r"])
    assert caplog.text == ""
    _check_read({"lora": {"r": 8}, "seed": 2}, before, ["lora"])
    assert "ignored, because this stage does not read it: seed" in caplog.text
    with pytest.raises(CapasError, match="this stage does not read seed"):
        _check_read({"lora": {"r": 4}, "seed": 2}, before, ["lora"])


def test_help_is_answered(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("copy", copy, ["--help"])
    assert "Arguments on the command line are Hydra overrides" in capsys.readouterr().out
