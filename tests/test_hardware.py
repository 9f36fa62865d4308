"""The device and its kernels are those that were asked for, or the stage says why not."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capas import hardware
from capas.errors import CapasError
from capas.params import Params

CPU = {
    "device": "cpu",
    "num_threads": 1,
    "instruction_set": "avx2",
    "allow_tf32": False,
    "cudnn_deterministic": True,
    "cudnn_benchmark": False,
}


def options(**changes: object) -> Params:
    return Params({**CPU, **changes})


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` sets os.environ: give it a copy."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_instruction_set_is_told_to_all_three_libraries() -> None:
    found = hardware.environment(options())
    assert found["ATEN_CPU_CAPABILITY"] == "avx2"
    assert found["MKL_CBWR"] == "AVX2,STRICT"
    assert found["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "ATEN_CPU_CAPABILITY" not in hardware.environment(options(instruction_set="default"))


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cpu", "0,1", ""),
        ("cuda", None, "0"),
        ("cuda", "2,3", "2"),
        ("cuda", "", ""),
    ],
)
def test_one_process_sees_one_gpu(device: str, visible: str | None, expected: str) -> None:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    assert hardware.environment(options(device=device))["CUDA_VISIBLE_DEVICES"] == expected


def test_prepare_sets_torch() -> None:
    assert hardware.prepare(options()) == torch.device("cpu")
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    facts = hardware.facts(torch.device("cpu"))
    assert facts["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(CapasError, match=r"no usable NVIDIA GPU here.*hardware=cpu"):
        hardware.prepare(options(device="cuda", instruction_set="default"))


def test_instruction_set_that_the_cpu_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(hardware, "cpu_flags", lambda: {"avx", "avx2", "fma"})
    with pytest.raises(
        CapasError, match=r"avx512.*does not report avx512bw.*instruction_set=default"
    ):
        hardware.prepare(options(instruction_set="avx512"))


def test_on_arm_it_is_said_that_bytes_differ(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    hardware.prepare(options())
    assert "bytes differ from those of an x86 machine" in caplog.text


def test_cpu_flags_are_read_from_the_kernel(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nflags\t\t: other\n")
    assert hardware.cpu_flags(cpuinfo) == {"fpu", "avx2", "fma"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_torch_imported_too_early_is_an_error() -> None:
    """In a process of its own: torch chooses its kernels when it is loaded."""
    script = (
        "import os, torch; from capas import hardware; from capas.params import Params;"
        "torch.backends.cpu.get_cpu_capability = lambda: 'DEFAULT';"
        f"hardware.prepare(Params({CPU!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "torch computes with DEFAULT: it was imported before" in done.stderr


def test_other_processes_than_asked_for_are_refused_in_words() -> None:
    with pytest.raises(CapasError, match=r"1 processes were launched .*and this stage is 2"):
        hardware.prepare(options(), num_processes=2)
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(CapasError, match=r"2 processes were launched .*and this stage is 1"):
        hardware.prepare(options())


def test_each_of_several_processes_sees_all_gpus_and_takes_one() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in hardware.environment(options(device="cuda"), 2)
    assert hardware.environment(options(), 2)["CUDA_VISIBLE_DEVICES"] == ""
    hardware._check_gpu(1, num_gpus=2)
    with pytest.raises(CapasError, match=r"this machine has 2, .*needs 3 or more on each"):
        hardware._check_gpu(2, num_gpus=2)
