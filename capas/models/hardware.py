"""Set up the device that computes, and its kernels.

torch, oneMKL and oneDNN choose their kernels when they are loaded, so `prepare` comes before the first
import of torch; `capas.models.kernels` defines the choices.
"""

import logging
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

from capas.core.cores import at_most, physical_cores
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.models import kernels

if TYPE_CHECKING:
    import torch

log = logging.getLogger("capas")
# At every call of every layer, LLM.int8() warns that it computes activations in float16, which is intended.
# On CPUs with AVX512-BF16 bitsandbytes warns of a missing kernel that capas.models.loading disables anyway.
for _talkative in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_talkative).setLevel(logging.ERROR)

_NOT_X86 = (
    "hardware.instruction_set=portable is for x86 CPUs, but this machine is %s: results repeat "
    "here, but their bytes differ from those of an x86 machine"
)
MAX_PORTABLE_THREADS = 2


def prepare(hardware: Params, num_processes: int = 1) -> "torch.device":
    """Set the environment, import torch and set its flags; return the device that the stage computes on.

    A single process sees one GPU, so that nothing falls back to DataParallel. If several processes run on a
    machine, each takes the GPU of its LOCAL_RANK. On a CPU no GPU is visible.

    Raises:
        CapasError: the machine lacks the device or the instruction set, or a library ignores it; or
            more or fewer than `num_processes` processes were launched.
    """
    _check_launched(int(os.environ.get("WORLD_SIZE", "1")), num_processes)
    torch_was_loaded = "torch" in sys.modules
    kernels.check_supported(hardware.instruction_set)
    if hardware.instruction_set == "portable" and not kernels.is_x86():
        log.warning(_NOT_X86, platform.machine())
    os.environ.update(environment(hardware, num_processes))
    import torch

    kernels.check_in_use(hardware.instruction_set, torch_was_loaded)
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
    torch.set_num_threads(num_threads(hardware, num_processes))
    torch.use_deterministic_algorithms(hardware.cudnn_deterministic)
    # A debugging aid that would write every buffer twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = hardware.allow_tf32
    torch.backends.cudnn.allow_tf32 = hardware.allow_tf32
    torch.backends.cudnn.deterministic = hardware.cudnn_deterministic
    torch.backends.cudnn.benchmark = hardware.cudnn_benchmark
    kernels.warm_up()
    if hardware.instruction_set == "portable":
        kernels.use_one_thread()
    return torch.device("cpu") if hardware.device == "cpu" else torch.device("cuda", local_rank)


def environment(hardware: Params, num_processes: int = 1) -> dict[str, str]:
    """Return the environment variables that libraries read when they are loaded."""
    threads = str(num_threads(hardware, num_processes))
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads make a busy machine ten times slower
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # makes cuBLAS deterministic
        "TORCHDYNAMO_DISABLE": "1",  # or bitsandbytes compiles kernels if it finds a C compiler
        "HF_HUB_OFFLINE": "1",  # only the fetch stages use a network
        "TOKENIZERS_PARALLELISM": "false",
    }
    if hardware.device == "cpu" or num_processes == 1:
        variables["CUDA_VISIBLE_DEVICES"] = _visible_devices(hardware.device)
    if hardware.device == "cpu" and num_processes > 1:
        variables["ACCELERATE_TORCH_DEVICE"] = "cpu"  # torch.load does not accept cpu:0
    return variables | kernels.environment(hardware.instruction_set)


def num_threads(hardware: Params, num_processes: int = 1) -> int:
    """Return hardware.num_threads or, if it is null, this process's share of the physical cores.

    Portable kernels use at most two threads. With up to four allowed, torch uses three for small tensors and
    then splits a tensor between vector and scalar functions, which round differently.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    found = at_most(hardware.num_threads or max(1, physical_cores() // here))
    return min(found, MAX_PORTABLE_THREADS) if hardware.instruction_set == "portable" else found


def facts(device: "torch.device") -> dict[str, object]:
    """Return a description of the device and its settings, without facts that may differ for equal bytes."""
    import torch

    found: dict[str, object] = {
        "device": device.type,
        "kernels_asked_for": {
            name: os.environ.get(variable) for name, variable in kernels.VARIABLES.items()
        },
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return found


def machine() -> dict[str, Any]:
    """Return the CPU and the kernels in use, for reports/timings and MLflow; machines differ in them."""
    return {"cpu": kernels.cpu()["model"], "kernels": kernels.in_use()}


def _visible_devices(device: str) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # an empty value hides all GPUs
    return "" if device == "cpu" else visible.split(",")[0]


def _check_launched(there: int, expected: int) -> None:
    if there != expected:
        raise CapasError(
            f"{there} processes were launched (WORLD_SIZE), but this stage is {expected}. Run `dvc "
            "repro` without a launcher; training itself starts hardware.num_processes processes"
        )


def _check_gpu(local_rank: int, num_gpus: int) -> None:
    if local_rank >= num_gpus:
        raise CapasError(
            f"too few GPUs: this machine has {num_gpus}, but hardware.num_processes needs at least "
            f"{local_rank + 1} on each machine"
        )
