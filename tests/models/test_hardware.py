"""The device and its kernels are those that were asked for, or the stage says why not."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from capas.core.cores import MAX_THREADS
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.models import hardware, kernels

CPU = {
    "device": "cpu",
    "num_threads": 1,
    "instruction_set": "portable",
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


def test_the_kernels_are_asked_for_in_the_environment() -> None:
    assert hardware.environment(options()).items() >= kernels.environment("portable").items()
    assert hardware.environment(options()).get("MKL_CBWR") == kernels.environment("portable").get(
        "MKL_CBWR"
    )


def test_without_a_number_of_threads_each_physical_core_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "physical_cores", lambda: 6)
    monkeypatch.delenv(MAX_THREADS, raising=False)
    chosen = options(num_threads=None, instruction_set="native")
    assert hardware.num_threads(options(num_threads=None)) == 2  # portable
    assert hardware.num_threads(chosen) == 6
    assert hardware.environment(chosen)["OMP_NUM_THREADS"] == "6"
    assert hardware.num_threads(chosen, num_processes=4) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # on this machine, of those on all
    assert hardware.num_threads(chosen, num_processes=4) == 3
    monkeypatch.setenv(MAX_THREADS, "2")
    assert hardware.num_threads(chosen) == 2


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
    asked = kernels.environment("portable")
    assert list(facts["kernels_asked_for"].values()) == [
        asked.get(v) for v in kernels.VARIABLES.values()
    ]


def test_what_differs_between_machines_is_told_apart() -> None:
    found = hardware.machine()
    assert found == {"cpu": kernels.cpu()["model"], "kernels": kernels.in_use()}
    assert found["cpu"] not in str(hardware.facts(torch.device("cpu")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(CapasError, match=r"no usable NVIDIA GPU here.*hardware=cpu"):
        hardware.prepare(options(device="cuda", instruction_set="native"))


def test_on_arm_it_is_said_that_bytes_differ(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    hardware.prepare(options())
    assert "bytes differ from those of an x86 machine" in caplog.text


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_torch_imported_too_early_is_an_error() -> None:
    """In a process of its own: torch chooses its kernels when it is loaded."""
    script = (
        "import os, torch; from capas.models import hardware; from capas.core.params import Params;"
        "torch.backends.cpu.get_cpu_capability = lambda: 'DEFAULT';"
        f"hardware.prepare(Params({CPU!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "aten with DEFAULT is in use: torch was imported before" in done.stderr


def test_other_processes_than_asked_for_are_refused_in_words() -> None:
    with pytest.raises(CapasError, match=r"1 processes were launched .*but this stage is 2"):
        hardware.prepare(options(), num_processes=2)
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(CapasError, match=r"2 processes were launched .*but this stage is 1"):
        hardware.prepare(options())


def test_each_of_several_processes_sees_all_gpus_and_takes_one() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in hardware.environment(options(device="cuda"), 2)
    assert hardware.environment(options(), 2)["CUDA_VISIBLE_DEVICES"] == ""
    hardware._check_gpu(1, num_gpus=2)
    with pytest.raises(CapasError, match=r"this machine has 2, .*needs at least 3 on each"):
        hardware._check_gpu(2, num_gpus=2)
