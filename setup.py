"""Builds one CPU library per instruction set, and one for CUDA, all under torch's stable ABI and Python's abi3, with ninja."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

COMPILE_VARIABLE = "SEGNEXT_KERNELS_COMPILE"  # 0: install without compiled kernels
INTERFACE = "-DSEGNEXT_" + re.search(r"(?m)^INTERFACE = \d+", Path("segnext_kernels/_load.py").read_text())[0].replace(" ", "")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized", "-Wno-psabi", "-ffp-contract=fast"]
FLAGS += ["-g0"]  # Python's own flags ask for debug information: 10 of 12 MB, and a fifth of the time
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512_BF16 = [*AVX512, "-mavx512bf16"]
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16}
    INSTRUCTION_SETS |= {"amx_bf16": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]}


def remove_other_libraries(wanted: list[Extension] | None) -> None:
    """Those that an earlier build left in the source tree, which would be loaded beside the wanted ones."""
    names = {extension.name.rpartition(".")[2] for extension in wanted or ()}
    for library in Path("segnext_kernels").glob("_*.so"):
        if library.name.partition(".")[0] not in names:
            library.unlink()


class BuildPy(build_py):
    """Begins without what an earlier build left, which would be packed too: modules that are gone, libraries not wanted now."""

    def run(self) -> None:
        if self.editable_mode:
            remove_other_libraries(self.distribution.ext_modules)
        else:
            for package in ("segnext_kernels", "segnext"):
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()


def check_python() -> None:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise SystemExit(
            "segnext-kernels: the kernels are built for Python's stable ABI, which free-threaded Python does not have. Use"
            f" another Python, or set {COMPILE_VARIABLE}=0 to install without compiled kernels."
        )


def check_compiler() -> None:
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
    """Those that the compiler knows: GCC 10 has no matrix tiles. All where it knows nothing, for sdists need none."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))

    def knows(flags: list[str]) -> bool:
        trial = [*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        return shutil.which(compiler[0]) is not None and subprocess.run(trial, capture_output=True).returncode == 0

    known = {isa: flags for isa, flags in INSTRUCTION_SETS.items() if knows(flags)}
    if not known:
        return INSTRUCTION_SETS
    for isa in INSTRUCTION_SETS.keys() - known.keys():
        print(f"segnext-kernels: {compiler[0]} does not know {isa}, so the kernels for it are left out")
    return known


def cuda_home() -> Path | None:
    """The toolkit's folder: CUDA_HOME, or the one that the nvcc on PATH, which may be a wrapper, says it belongs to."""
    if home := os.environ.get("CUDA_HOME"):  # and no other
        return Path(home) if Path(home, "bin", "nvcc").exists() else None
    if shutil.which("nvcc") is None:
        return None
    trial = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.+)", trial)
    return Path(top[1]).resolve() if top else None


def cuda_architectures(home: Path) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else those of torch from Turing on that nvcc knows, such as "9.0", the last as PTX too."""
    import torch

    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        names = re.split(r"[ ;]+", listed.strip(" ;"))
        if unknown := [name for name in names if not re.fullmatch(r"\d+\.\da?(\+PTX)?", name)]:
            raise SystemExit(f"segnext-kernels: TORCH_CUDA_ARCH_LIST has {unknown[0]!r}: give numbers, such as 8.0 or 9.0+PTX")
        return names
    flags = torch._C._cuda_getArchFlags() if torch.version.cuda else "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
    known = subprocess.run(
        [home / "bin" / "nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    names = sorted({int(name[3:]) for name in flags.split() if name[3:].isdigit() and name in known and int(name[3:]) >= 75})
    return [f"{name // 10}.{name % 10}" for name in names[:-1]] + [f"{names[-1] // 10}.{names[-1] % 10}+PTX"]


def cuda_extension() -> Extension | None:
    """None where CUDA is not wanted: FORCE_CUDA=1 and 0 decide, else torch's own CUDA and an nvcc of its major version."""
    import torch

    wanted, home, named = os.environ.get("FORCE_CUDA"), cuda_home(), os.environ.get("CUDA_HOME")
    lacking = f"there is no bin/nvcc in CUDA_HOME, {named}" if named else "there is no nvcc on PATH, and CUDA_HOME is not set"
    if wanted == "1" and home is None:
        raise SystemExit(f"segnext-kernels: FORCE_CUDA=1, but {lacking}")
    reason = None
    if wanted == "0":
        reason = "FORCE_CUDA=0"
    elif wanted != "1" and torch.version.cuda is None:
        reason = "this torch has no CUDA (FORCE_CUDA=1 builds it nevertheless)"
    elif home is None:
        reason = lacking
    elif torch.version.cuda is not None:
        version = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)", version)
        if release is None or release[1] != torch.version.cuda.split(".")[0]:
            reason = f"nvcc is {release[1] if release else 'unknown'}, torch has CUDA {torch.version.cuda}"
            if wanted == "1":
                raise SystemExit(f"segnext-kernels: FORCE_CUDA=1, but {reason}, and torch builds for its own alone")
    if reason is not None:
        print(f"segnext-kernels: the CUDA kernels are left out: {reason}")
        return None
    os.environ["CUDA_HOME"] = str(home)  # before torch.utils.cpp_extension looks for it
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(home)
    architectures = cuda_architectures(home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)
    print(f"segnext-kernels: the CUDA kernels are built for {', '.join(architectures)}")
    facts = [TORCH_TARGET, f'-DSEGNEXT_CUDA_ARCHITECTURES="{" ".join(architectures)}"']
    return cpp_extension.CppExtension(
        "segnext_kernels._C_cuda",
        ["csrc/bindings_cuda.cpp", *sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))],
        include_dirs=[str(Path("csrc").resolve()), str(home / "include")],
        library_dirs=[str(path) for path in (home / "lib64", home / "lib", *home.glob("targets/*/lib")) if path.is_dir()],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"],  # whose libtorch_cuda knows the stream
        extra_compile_args={
            "cxx": ["-O2", "-std=c++20", "-fvisibility=hidden", "-Wall", *facts],
            "nvcc": ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden", "--threads", "2"],
        },
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    from torch.utils.cpp_extension import CppExtension

    cuda = cuda_extension()
    headers = sorted(str(path) for path in Path("csrc").glob("**/*.h"))
    sources = sorted(
        str(path) for pattern in ("bindings.cpp", "bindings_inference.cpp", "cpu/*.cpp") for path in Path("csrc").glob(pattern)
    )
    cpu = Extension(
        "segnext_kernels._cpu",
        ["csrc/cpu_features.cpp"],
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=["-O2", "-std=c++20", INTERFACE],
        depends=headers,
        py_limited_api=True,
    )
    return (
        [cpu]
        + [
            CppExtension(
                f"segnext_kernels._C_{isa}",
                sources,
                include_dirs=[str(Path("csrc").resolve())],
                extra_compile_args=[*FLAGS, *flags, TORCH_TARGET, f"-DSEGNEXT_ISA={isa}"],
                depends=headers,
                py_limited_api=True,
            )
            for isa, flags in instruction_sets().items()
        ]
        + ([cuda] if cuda else [])
    )


if os.environ.get(COMPILE_VARIABLE, "1") == "0":
    setup(cmdclass={"build_py": BuildPy})
else:
    check_python()
    from torch.utils.cpp_extension import BuildExtension

    class BuildEach(BuildExtension):
        """The objects of each library have a folder of their own, where ninja finds those that a change leaves as they are."""

        def run(self) -> None:
            check_compiler()
            if self.inplace:
                remove_other_libraries(self.extensions)
            self.parallel = None  # each library's ninja has all processors, and its folder is the command's state
            super().run()

        def build_extension(self, ext: Extension) -> None:
            shared = self.build_temp
            self.build_temp = str(Path(shared, ext.name))
            super().build_extension(ext)
            self.build_temp = shared

    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildEach, "build_py": BuildPy},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
