"""Choose the kernels of ATen, oneMKL and oneDNN on a CPU, and check which ones are in use.

All three choose when they are first used. Kernels of another instruction set round differently, and
so do those that oneMKL takes on another vendor's CPU: it honours its reproducible branches AVX2 and
AVX512 only on Intel CPUs and silently takes AUTO elsewhere (Intel, oneMKL developer guide,
"Conditional Numerical Reproducibility"). COMPATIBLE is the one branch that computes the same bytes
on Intel and on AMD; its products are two to three times slower.
"""

import ctypes
import functools
import os
import platform
import sys
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError

CPUINFO = Path("/proc/cpuinfo")
# hardware.instruction_set -> settings of ATen, oneMKL and oneDNN; `native` chooses settings for this CPU.
_REQUESTED = {
    "portable": ("avx2", "COMPATIBLE", "AVX2"),
    "avx2": ("avx2", "AVX2,STRICT", "AVX2"),
    "avx512": ("avx512", "AVX512,STRICT", "AVX512_CORE"),
}
VARIABLES = {"aten": "ATEN_CPU_CAPABILITY", "mkl": "MKL_CBWR", "onednn": "ONEDNN_MAX_CPU_ISA"}
_AVX2, _AVX512 = {"avx2", "fma"}, {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_FLAGS = {"portable": _AVX2, "avx2": _AVX2, "avx512": _AVX512}  # names from /proc/cpuinfo
# results of mkl_cbwr_get
_BRANCHES = {1: "off", 2: "AUTO", 3: "COMPATIBLE", 10: "AVX2", 12: "AVX512"}
# torch's names for the vector functions of oneMKL (VML) that libtorch contains.
VECTOR_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"),
    *("log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc"),
)


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def cpu(cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """Return the CPU's vendor, model and flags as Linux names them; on other systems AVX2 is assumed."""
    if not cpuinfo.exists():
        return {"vendor": "", "model": platform.processor(), "flags": set(_AVX2)}
    found: dict[str, str] = {}
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        found[key.strip()] = value.strip()
    numbers = [found.get(key, "") for key in ("cpu family", "model")]
    name = found.get("model name", platform.machine())
    model = f"{name} (family {numbers[0]} model {numbers[1]})" if all(numbers) else name
    return {
        "vendor": found.get("vendor_id", ""),
        "model": model,
        "flags": set(found.get("flags", "").split()),
    }


def check_supported(instruction_set: str) -> None:
    """Check that this CPU has what `instruction_set` needs; otherwise the process would end with SIGILL.

    Raises:
        CapasError: it lacks a feature, or it is not an x86 CPU and the choice is neither native nor portable.
    """
    if instruction_set not in _FLAGS or (not is_x86() and instruction_set == "portable"):
        return
    missing = _FLAGS[instruction_set] - cpu()["flags"]
    if missing:
        raise CapasError(
            f"hardware.instruction_set={instruction_set}, but this CPU does not report "
            f"{', '.join(sorted(missing))}. Choose hardware.instruction_set=native: results then "
            "repeat on this kind of CPU only, and their bytes differ on others"
        )


def environment(instruction_set: str) -> dict[str, str]:
    """Return the environment variables that make the three libraries choose their kernels.

    native uses all features of the CPU, and the fastest branch that oneMKL honours on it, so that results
    repeat.
    """
    if not is_x86():
        return {}
    if instruction_set not in _REQUESTED:
        return {"MKL_CBWR": _native_branch()}
    return dict(zip(VARIABLES.values(), _REQUESTED[instruction_set], strict=True))


def in_use() -> dict[str, str]:
    """Return the kernels that ATen and oneMKL report for this process; this imports torch."""
    import torch

    branch = _mkl_branch()
    mkl = "none" if branch is None else _BRANCHES.get(branch, f"branch {branch}")
    return {"aten": torch.backends.cpu.get_cpu_capability(), "mkl": mkl}


def check_in_use(instruction_set: str, torch_was_loaded: bool) -> None:
    """Check that the libraries use the requested kernels; `native` leaves the choice to them.

    Raises:
        CapasError: a library computes with other kernels; the message explains why.
    """
    if instruction_set not in _REQUESTED or not is_x86():
        return
    aten, mkl, _ = _REQUESTED[instruction_set]
    expected = {"aten": aten.upper(), "mkl": mkl.removesuffix(",STRICT")}
    found = in_use()
    if found == expected:
        return
    seen = ", ".join(
        f"{name} with {found[name]}" for name in found if found[name] != expected[name]
    )
    if instruction_set != "portable" and cpu()["vendor"] != "GenuineIntel":
        why = (
            "oneMKL supports it on Intel CPUs only. Choose native (the fastest here), or portable "
            "(the same bytes on every x86 CPU)"
        )
    elif torch_was_loaded:
        why = (
            "torch was imported before the stage could set it. Run the stage in a process of its "
            "own"
        )
    else:
        why = "choose native or portable"
    raise CapasError(
        f"hardware.instruction_set={instruction_set} is ignored: {seen} is in use: {why}"
    )


def warm_up() -> None:
    """Call every vector function of oneMKL once, before several threads do.

    oneMKL 2024.2 chooses the kernel of a function in its first call; of concurrent first calls one
    may compute with a kernel of low accuracy (pytorch issue 188792).
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for name in VECTOR_FUNCTIONS:
            getattr(torch, name)(one)


def use_one_thread() -> None:
    """Run this thread's oneMKL products on one thread, whatever number of threads torch is set to.

    oneMKL's branch COMPATIBLE rounds differently on 1, 2, 3 and 4 threads. Operations that torch divides
    itself, such as attention, keep their threads. Call it after `torch.set_num_threads`.
    """
    import torch

    torch.get_num_threads()  # a thread's first call sets oneMKL's threads again, so it comes first
    if (library := mkl()) is not None:
        library.MKL_Set_Num_Threads_Local(1)


def keep_weights_unpacked() -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16, for the whole process.

    On these CPUs the first evaluation repacks every Linear4bit in place and computes in bfloat16 from then
    on. A training that continues afterwards crashes or silently loses gradient, and merged logits are
    off (bitsandbytes 0.50).
    """
    try:
        from bitsandbytes.nn import modules
    except ImportError:  # no build for this machine, so there are no such layers either
        return
    modules.has_avx512bf16 = lambda: False  # called when a layer is made


@functools.cache
def mkl() -> Any:
    """Return the library that contains oneMKL, or None if torch was built without it."""
    import torch

    file = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = ctypes.CDLL(str(file)) if file.exists() else None
    return library if hasattr(library, "mkl_serv_cbwr_get") else None


def _native_branch() -> str:
    found = cpu()
    if found["vendor"] != "GenuineIntel":
        return "AUTO"
    return "AVX512,STRICT" if found["flags"] >= _AVX512 else "AVX2,STRICT"


def _mkl_branch() -> int | None:
    library = mkl()
    return None if library is None else int(library.mkl_serv_cbwr_get(1))  # 1: MKL_CBWR_BRANCH


def show(instruction_set: str) -> str:
    """Return this CPU and the kernels that `instruction_set` gives on it; torch must not be imported yet."""
    found = cpu()
    check_supported(instruction_set)
    os.environ.update(environment(instruction_set))
    chosen = ", ".join(f"{name} {used}" for name, used in in_use().items())
    notable = sorted(
        flag for flag in found["flags"] if flag.startswith(("avx", "amx", "fma", "sse4"))
    )
    return f"CPU: {found['model']}, {found['vendor']}, {' '.join(notable)}\n{instruction_set}: {chosen}"


if __name__ == "__main__":
    sys.stdout.write(show((sys.argv[1:] or ["portable"])[0]) + "\n")
