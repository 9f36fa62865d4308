"""The kernels of ATen, oneMKL and oneDNN, and the same bytes on another vendor's CPU."""

import ast
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import REPOSITORY

from capas.core.cores import MAX_THREADS
from capas.core.errors import CapasError
from capas.models import kernels

x86 = pytest.mark.skipif(not kernels.is_x86(), reason="kernels of x86")
INTEL, OTHER = {"vendor": "GenuineIntel", "model": "x"}, {"vendor": "AuthenticAMD", "model": "x"}
AVX2, AVX512 = {"avx2", "fma"}, {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}


@x86
def test_portable_is_told_to_all_three_libraries() -> None:
    assert kernels.environment("portable") == {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }


@x86
@pytest.mark.parametrize(
    ("found", "branch"),
    [
        (INTEL | {"flags": AVX512}, "AVX512,STRICT"),
        (INTEL | {"flags": AVX2}, "AVX2,STRICT"),
        (OTHER | {"flags": AVX512}, "AUTO"),
    ],
)
def test_native_takes_the_fastest_branch_that_the_cpu_honours(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], branch: str
) -> None:
    monkeypatch.setattr(kernels, "cpu", lambda: found)
    assert kernels.environment("native") == {"MKL_CBWR": branch}


def test_on_another_architecture_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert kernels.environment("portable") == kernels.environment("native") == {}
    kernels.check_supported("portable")
    with pytest.raises(CapasError, match="instruction_set=avx512, but this CPU does not report"):
        monkeypatch.setattr(kernels, "cpu", lambda: OTHER | {"flags": {"neon"}})
        kernels.check_supported("avx512")


@x86
def test_a_cpu_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cpu", lambda: OTHER | {"flags": AVX2})
    kernels.check_supported("portable")
    with pytest.raises(CapasError, match=r"does not report avx512bw.*instruction_set=native"):
        kernels.check_supported("avx512")


def test_the_cpu_is_read_from_the_kernel(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\n"
        "model name\t: Xeon\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: other\n"
    )
    assert kernels.cpu(cpuinfo) == {
        "vendor": "GenuineIntel",
        "model": "Xeon (family 6 model 207)",
        "flags": {"fpu", "avx2", "fma"},
    }
    assert kernels.cpu(tmp_path / "none")["flags"] == AVX2


@x86
def test_the_number_of_threads_changes_no_product() -> None:
    """oneMKL's branch COMPATIBLE alone rounds these four products differently on 1, 2, 3 and 4 threads."""
    rows, weights = torch.ones(7850, 96).mul(0.1).cumsum(0), torch.linspace(-1, 1, 96 * 1024)
    before, found = torch.get_num_threads(), set()
    try:
        for num_threads in (1, 2, 3, 4):
            torch.set_num_threads(num_threads)
            kernels.use_one_thread()
            product = torch.nn.functional.linear(rows, weights.view(1024, 96))
            found.add(hashlib.sha256(product.numpy().tobytes()).hexdigest())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@x86
def test_a_stage_keeps_its_products_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: torch sets oneMKL's threads anew in its first parallel operation."""
    program = """
from capas.models import hardware, kernels
from capas.core.params import Params
flags = dict.fromkeys(("allow_tf32", "cudnn_benchmark"), False) | {"cudnn_deterministic": True}
hardware.prepare(Params({"device": "cpu", "num_threads": 2, "instruction_set": "portable", **flags}))
import torch
torch.rand(1000, 1000).exp()
print(torch.get_num_threads(), kernels.mkl().MKL_Get_Max_Threads())
"""
    monkeypatch.delenv(MAX_THREADS, raising=False)  # pytest's workers share the cores
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["2", "1"]


@x86
def test_these_tests_compute_with_portable_kernels() -> None:
    assert kernels.in_use() == {"aten": "AVX2", "mkl": "COMPATIBLE"}
    kernels.check_in_use("portable", torch_was_loaded=True)


@x86
@pytest.mark.parametrize(
    ("vendor", "loaded", "why"),
    [
        ("AuthenticAMD", False, "mkl with AUTO is in use: oneMKL supports it on Intel CPUs only"),
        ("AuthenticAMD", True, "mkl with AUTO is in use: oneMKL supports it on Intel CPUs only"),
        ("GenuineIntel", True, "torch was imported before the stage could set it"),
    ],
)
def test_a_choice_that_a_library_ignores_is_an_error(
    monkeypatch: pytest.MonkeyPatch, vendor: str, loaded: bool, why: str
) -> None:
    monkeypatch.setattr(kernels, "cpu", lambda: {"vendor": vendor})
    monkeypatch.setattr(kernels, "in_use", lambda: {"aten": "AVX2", "mkl": "AUTO"})
    kernels.check_in_use("native", torch_was_loaded=loaded)
    with pytest.raises(CapasError, match=rf"instruction_set=avx2 is ignored: .*{why}"):
        kernels.check_in_use("avx2", torch_was_loaded=loaded)


# One step of what a training computes, and a hash of every result.
COMPUTE = """
import ctypes, hashlib, json, os
import torch
from capas.models import kernels
kernels.warm_up()
torch.set_num_threads(2)
draw = torch.Generator().manual_seed(0)
library = ctypes.CDLL(None) if "LD_PRELOAD" in os.environ else kernels.mkl()
found = {"kernels": kernels.in_use(), "intel": library.mkl_serv_intel_cpu_true()}
def note(name, *tensors):
    sums = [hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest() for t in tensors]
    found[name] = sums
x, y = torch.randn(300, 128, generator=draw), torch.randn(128, 320, generator=draw)
note("matmul", x @ y, y.T @ x.T, torch.nn.functional.linear(x, y.T.contiguous(), y[0]))
q = torch.randn(2, 4, 50, 32, generator=draw)
note("sdpa", torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
weights = (q @ q.transpose(2, 3) / 32**0.5 + torch.full((50, 50), -1e38).triu(1)).softmax(-1)
note("eager attention", weights, weights @ q)
z = torch.rand(40000, generator=draw) * 0.98 + 0.01
for name in kernels.VECTOR_FUNCTIONS:
    note(name, getattr(torch, name)(z), getattr(torch, name)(z.double()))
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(128, 320), torch.nn.SiLU(), torch.nn.Linear(320, 64))
optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2, fused=True)
for _ in range(4):
    loss = torch.nn.functional.cross_entropy(layers(x), torch.arange(300) % 64)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
note("training", loss, *layers.parameters())
print(json.dumps(found))
"""


def compute(instruction_set: str, preloaded: Path | None, *emulator: str) -> dict[str, Any]:
    asked = dict(zip(kernels.VARIABLES.values(), kernels._REQUESTED[instruction_set], strict=True))
    preload = {} if preloaded is None else {"LD_PRELOAD": str(preloaded)}
    done = subprocess.run(
        [*emulator, sys.executable, "-c", COMPUTE],
        env={**os.environ, **asked, **preload, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def vendors(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Libraries that make oneMKL take any CPU for Intel's (True) or another vendor's (False)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    folder, found = tmp_path_factory.mktemp("vendors"), {}
    for intel in (False, True):
        source, library = folder / f"{intel}.c", folder / f"{intel}.so"
        functions = ("mkl_serv_intel_cpu_true", "mkl_serv_intel_cpu")
        source.write_text("".join(f"int {f}(void) {{ return {int(intel)}; }}\n" for f in functions))
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        found[intel] = library
    return found


@x86
def test_portable_kernels_give_the_same_bytes_on_another_vendors_cpu(
    vendors: dict[bool, Path],
) -> None:
    intel, other = (compute("portable", vendors[is_intel]) for is_intel in (True, False))
    assert (intel.pop("intel"), other.pop("intel")) == (1, 0)
    assert len(intel) == 5 + len(kernels.VECTOR_FUNCTIONS)
    assert intel == other


@x86
def test_the_kernels_of_avx2_do_not(vendors: dict[bool, Path]) -> None:
    """The test above can fail: oneMKL drops this request on another vendor's CPU."""
    intel, other = (compute("avx2", vendors[is_intel]) for is_intel in (True, False))
    assert (intel["kernels"]["mkl"], other["kernels"]["mkl"]) == ("AVX2", "AUTO")
    assert intel["exp"] != other["exp"]
    assert intel["training"] != other["training"] or intel["sqrt"] != other["sqrt"]


# oneMKL computes these from an approximation of the CPU (rsqrtps and the like), which AMD and Intel
# round differently, even in its COMPATIBLE branch. No stage calls them with portable kernels:
# capas.training.optimizers.
BY_VENDOR = {"acos", "asin", "atan", "log", "sqrt", "tan"}


@x86
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs Debian's qemu-user")
def test_portable_kernels_give_the_same_bytes_on_an_emulated_intel_cpu() -> None:
    """QEMU computes what a Haswell would, but its approximations (rsqrtps) in a way of its own."""
    here, there = (
        compute("portable", None),
        compute("portable", None, "qemu-x86_64", "-cpu", "Haswell"),
    )
    assert there["intel"] == 1
    names = here.keys() - {"intel"}
    assert {name for name in names if here[name] != there[name]} <= BY_VENDOR
    assert here["sqrt"] != there["sqrt"], "the emulated CPU approximates as this one does"


# The functions of oneMKL's vector library.
_VML = (
    "Abs Acos Acosh Acospi Add Arg Asin Asinh Asinpi Atan Atan2 Atan2pi Atanh Atanpi Cbrt "
    "CdfNorm CdfNormInv Ceil Conj CopySign Cos Cosd Cosh Cospi Div Erf ErfCInv ErfInv Erfc "
    "Exp Exp10 Exp2 ExpInt1 Expm1 Fdim Floor Fmax Fmin Fmod Frac Hypot I0 I1 Inv InvCbrt "
    "InvSqrt J0 J1 Jn LGamma LinearFrac Ln Log10 Log1p Log2 Logb MaxMag MinMag Modf Mul "
    "NearbyInt NextAfter Pow Pow2o3 Pow3o2 PowrPowx Remainder Rint Round Sin SinCos Sind Sinh "
    "Sinpi Sqr Sqrt Sub TGamma Tan Tand Tanh Tanpi Trunc Y0 Y1 Yn"
)


@x86
def test_every_vector_function_that_torch_brings_is_warmed_up() -> None:
    """libtorch holds of oneMKL what ATen calls, and nothing else: it is linked statically."""
    library = kernels.mkl()
    there = {name for name in _VML.split() if hasattr(library, f"vms{name}")}
    assert {"log" if name == "Ln" else name.lower() for name in there} == set(
        kernels.VECTOR_FUNCTIONS
    )


def test_warming_up_calls_each_function_in_both_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in kernels.VECTOR_FUNCTIONS:
        monkeypatch.setattr(torch, name, lambda x, name=name: called.append((name, x.dtype)))
    kernels.warm_up()
    types = (torch.float32, torch.float64)
    assert sorted(called, key=str) == sorted(
        ((name, dtype) for name in kernels.VECTOR_FUNCTIONS for dtype in types), key=str
    )


def test_no_layer_repacks_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this CPU has, the library says that it has AVX512-BF16."""
    import capas.models.loading

    assert capas.models.loading.load_model
    monkeypatch.setattr(bitsandbytes.functional, "has_avx512bf16", lambda: True)
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": torch.ones(64, 64), "bias": torch.zeros(64)})
    layer = layer.to("cpu").eval()
    before = hashlib.sha256(layer.weight.data.numpy().tobytes()).hexdigest()
    with torch.no_grad():
        layer(torch.ones(3, 64))
    assert not layer.support_avx512bf16_for_cpu
    assert hashlib.sha256(layer.weight.data.numpy().tobytes()).hexdigest() == before


LOADERS = {"AutoModelForCausalLM", "FastLanguageModel", "PeftModel", "HFLM"}


def loads_models(tree: ast.AST) -> bool:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return bool(LOADERS & names & imported)


def test_whoever_loads_a_model_imports_its_loading() -> None:
    """Importing it switches bitsandbytes' repacking off: stages, chat, merge, harness, Unsloth, serving."""
    files = [*REPOSITORY.glob("capas/**/*.py"), *REPOSITORY.glob("stages/*.py")]
    found, without = [], []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if file.name == "loading.py" or not loads_models(tree):
            continue
        found.append(file.stem)
        imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if "capas.models.loading" not in imports:
            without.append(file.stem)
    assert sorted(found) == [
        "activations",
        "cost",
        "duration",
        "harness",
        "merge",
        "unsloth",
        "used_settings",
    ]
    assert sorted(without) == ["activations", "cost"]  # on the meta device, which computes nothing
