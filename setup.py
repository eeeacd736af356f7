"""Builds one CPU library per instruction set, all under torch's stable ABI and Python's abi3, with ninja."""

import os
import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

COMPILE_VARIABLE = "SEGNEXT_KERNELS_COMPILE"  # 0: install without compiled kernels
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized", "-ffp-contract=fast"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512_BF16 = [*AVX512, "-mavx512bf16"]
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16}
    INSTRUCTION_SETS |= {"amx_bf16": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]}


def check_toolchain() -> None:
    compiler = os.environ.get("CXX", "c++")
    header = Path(sysconfig.get_path("include"), "Python.h")
    trial = [*shlex.split(compiler), "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        subprocess.run(trial, check=True, capture_output=True, text=True)
        if header.exists():
            return
        problem = f"Python's own headers are missing ({header}). Install them (for example python3-dev)"
    except OSError:
        problem = f"no C++ compiler found ({compiler}). Install one (for example g++), name it in CXX"
    except subprocess.CalledProcessError as error:
        problem = f"{compiler} does not compile C++20 ({error.stderr.strip()}). Name GCC or Clang, 10 or newer, in CXX"
    raise SystemExit(
        f"segnext-kernels: {problem}, or set {COMPILE_VARIABLE}=0 to install without compiled kernels: everything then runs"
        " through plain PyTorch."
    )


def instruction_sets() -> dict[str, list[str]]:
    """Those that the compiler knows: GCC 10 has no matrix tiles."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    trial = ["-fsyntax-only", "-x", "c++", os.devnull]
    known = {
        isa: flags
        for isa, flags in INSTRUCTION_SETS.items()
        if subprocess.run([*compiler, *flags, *trial], capture_output=True).returncode == 0
    }
    for isa in INSTRUCTION_SETS.keys() - known.keys():
        print(f"segnext-kernels: {compiler[0]} does not know {isa}, so the kernels for it are left out")
    return known


def extensions() -> list[Extension]:
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(str(path) for pattern in ("bindings*.cpp", "cpu/*.cpp") for path in Path("csrc").glob(pattern))
    cpu = Extension(
        "segnext_kernels._cpu",
        ["csrc/cpu_features.cpp"],
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=["-O2", "-std=c++20"],
        py_limited_api=True,
    )
    return [cpu] + [
        CppExtension(
            f"segnext_kernels._C_{isa}",
            sources,
            include_dirs=[str(Path("csrc").resolve())],
            extra_compile_args=[*FLAGS, *flags, TORCH_TARGET, f"-DSEGNEXT_ISA={isa}"],
            py_limited_api=True,
        )
        for isa, flags in instruction_sets().items()
    ]


if os.environ.get(COMPILE_VARIABLE, "1") == "0":
    setup()
else:
    check_toolchain()
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
