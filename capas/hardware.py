"""Which device computes, and with which kernels.

torch, MKL and oneDNN choose their kernels when they are loaded, so `prepare` comes before the first
import of torch. Kernels of another instruction set round differently: the last bits of every float,
and with them the bytes of an adapter, depend on it.
"""

import logging
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from capas.cores import at_most
from capas.errors import CapasError
from capas.params import Params

if TYPE_CHECKING:
    import torch

log = logging.getLogger("capas")
# LLM.int8() says at every call of every layer that it computes activations in float16, as it should; and on
# CPUs with AVX512-BF16 bitsandbytes misses a kernel that capas.model would switch off anyway.
for _talkative in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_talkative).setLevel(logging.ERROR)

# ATen's, MKL's and oneDNN's names of one instruction set, and the flags that /proc/cpuinfo shows for it.
_KERNELS = {
    "avx2": ("avx2", "AVX2,STRICT", "AVX2"),
    "avx512": ("avx512", "AVX512,STRICT", "AVX512_CORE"),
}
_CPU_FLAGS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
_CAPABILITY = {"avx2": "AVX2", "avx512": "AVX512"}  # of torch.backends.cpu


def prepare(hardware: Params, num_processes: int = 1) -> "torch.device":
    """Set the environment, import torch and set its flags; the device that the stage computes on.

    A process that is alone sees one GPU, so that nothing can fall back to DataParallel; of several on a
    machine each takes the one of its LOCAL_RANK. On a CPU no GPU is visible.

    Raises:
        CapasError: the machine lacks the device or the instruction set, torch was imported before, or
            other than `num_processes` processes were launched.
    """
    _check_launched(int(os.environ.get("WORLD_SIZE", "1")), num_processes)
    _check_instruction_set(hardware.instruction_set)
    os.environ.update(environment(hardware, num_processes))
    import torch

    _check_capability(hardware.instruction_set, torch.backends.cpu.get_cpu_capability())
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise CapasError(
            "hardware.device=cuda, but torch finds no usable NVIDIA GPU here "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda}). "
            "Choose hardware=cpu, or install a CUDA build of torch and check `nvidia-smi`."
        )
    local_rank = int(os.environ["LOCAL_RANK"]) if num_processes > 1 else 0
    if hardware.device == "cuda" and num_processes > 1:
        _check_gpu(local_rank, torch.cuda.device_count())
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(at_most(hardware.num_threads))
    torch.use_deterministic_algorithms(hardware.cudnn_deterministic)
    # A debugging aid that writes every buffer twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = hardware.allow_tf32
    torch.backends.cudnn.allow_tf32 = hardware.allow_tf32
    torch.backends.cudnn.deterministic = hardware.cudnn_deterministic
    torch.backends.cudnn.benchmark = hardware.cudnn_benchmark
    return torch.device("cpu") if hardware.device == "cpu" else torch.device("cuda", local_rank)


def environment(hardware: Params, num_processes: int = 1) -> dict[str, str]:
    """The variables that libraries read when they are loaded."""
    threads = str(at_most(hardware.num_threads))
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads make a busy machine ten times slower
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what cuBLAS needs to be deterministic
        "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes would compile kernels where it finds a C compiler
        "HF_HUB_OFFLINE": "1",  # the fetch stages alone reach for a network
        "TOKENIZERS_PARALLELISM": "false",
    }
    if hardware.device == "cpu" or num_processes == 1:
        variables["CUDA_VISIBLE_DEVICES"] = _visible_devices(hardware.device)
    if hardware.device == "cpu" and num_processes > 1:
        variables["ACCELERATE_TORCH_DEVICE"] = "cpu"  # not cpu:0, for which torch.load has no place
    if hardware.instruction_set in _KERNELS:
        aten, mkl, onednn = _KERNELS[hardware.instruction_set]
        variables |= {"ATEN_CPU_CAPABILITY": aten, "MKL_CBWR": mkl, "ONEDNN_MAX_CPU_ISA": onednn}
    return variables


def facts(device: "torch.device") -> dict[str, object]:
    """What computes, as torch reports it; nothing that may differ between machines that give equal bytes."""
    import torch

    found: dict[str, object] = {
        "device": device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return found


def _visible_devices(device: str) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # empty: somebody hides them all
    return "" if device == "cpu" else visible.split(",")[0]


def _check_launched(there: int, asked: int) -> None:
    if there != asked:
        raise CapasError(
            f"{there} processes were launched (WORLD_SIZE), and this stage is {asked}: start it by itself, "
            "`dvc repro`. Training starts the processes of hardware.num_processes"
        )


def _check_gpu(local_rank: int, num_gpus: int) -> None:
    if local_rank >= num_gpus:
        raise CapasError(
            f"a process has no GPU: this machine has {num_gpus}, and hardware.num_processes needs "
            f"{local_rank + 1} or more on each"
        )


def _check_instruction_set(instruction_set: str) -> None:
    """An instruction set that the CPU lacks would end the process with SIGILL, without a word."""
    if instruction_set == "default":
        return
    if platform.machine().lower() not in ("x86_64", "amd64"):
        log.warning(
            "hardware.instruction_set=%s is one of x86 and this machine is %s: the results repeat here, "
            "but their bytes differ from those of an x86 machine",
            instruction_set,
            platform.machine(),
        )
        return
    missing = _CPU_FLAGS[instruction_set] - cpu_flags()
    if missing:
        raise CapasError(
            f"hardware.instruction_set={instruction_set}, but this CPU does not report "
            f"{', '.join(sorted(missing))}. Choose hardware.instruction_set=default (other bytes than on "
            "machines that have it)."
        )


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Features of the CPU as Linux names them; elsewhere (macOS on Intel) AVX2 is taken for granted."""
    if not cpuinfo.exists():
        return set(_CPU_FLAGS["avx2"])
    lines = cpuinfo.read_text().splitlines()
    return next(
        (set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set()
    )


def _check_capability(instruction_set: str, found: str) -> None:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and instruction_set in _CAPABILITY and found != _CAPABILITY[instruction_set]:
        raise CapasError(
            f"hardware.instruction_set={instruction_set}, but torch computes with {found}: it was imported "
            f"before the stage could choose. Start the stage by itself: python {Path(sys.argv[0]).name}"
        )
