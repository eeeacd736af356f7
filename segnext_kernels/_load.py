"""Finds and loads the compiled libraries, one that fits this processor and one for CUDA; says what is missing and why."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

INTERFACE = 4  # of the libraries: another number whenever a schema or what they tell changes, which setup.py compiles into _cpu

# From the best to the plainest, with the processor features (GCC's names) that each library was compiled for.
_LIBRARIES = {
    "amx_bf16": ("amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "avx2", "fma", "f16c"),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "baseline": (),
}
_HERE = Path(__file__).parent
ISA_VARIABLE = "SEGNEXT_KERNELS_ISA"
BUILD_VARIABLE = "SEGNEXT_KERNELS_COMPILE"

CUDA_VARIABLE = "FORCE_CUDA"
_ANOTHER_VERSION = "the compiled kernels are of another version of this package than its Python files: reinstall it"

facts: dict[str, str] = {}  # what the loaded library says of its own build
cuda_architectures: list[str] = []  # that the CUDA library was compiled for, such as "9.0" or, with PTX, "12.0+PTX"
cuda_version = 0  # that it was built with, such as 13000


def _load(wanted: str | None) -> str | None:
    """Loads the wanted library, or the best that this processor can run; returns why there is none."""
    if wanted and wanted not in _LIBRARIES:
        return f"there is no such instruction set; there are {', '.join(_LIBRARIES)}"
    try:
        processor = importlib.import_module("segnext_kernels._cpu")
    except ModuleNotFoundError:
        if installed := _installed_elsewhere():
            return _told(
                f"Python found the package in {_HERE}, where no kernels were compiled, before the one installed in {installed}:"
                " work in another folder, or install by pip install -e ."
            )
        return (
            f"the compiled CPU kernels were not built ({BUILD_VARIABLE}=0, or a source tree that is not installed);"
            " reinstall with a C++ compiler and without that variable"
        )
    except ImportError as error:
        return _told(f"the compiled CPU kernels did not load: {error}")
    if _of_another_version(processor):
        return _told(_ANOTHER_VERSION)
    features = processor.features()
    for isa in [wanted] if wanted else _worth_using(features):
        missing = [name for name in _LIBRARIES[isa] if name not in features]
        if missing:
            reason = f"this processor lacks {', '.join(missing)}"
            continue
        try:
            library = importlib.import_module(f"segnext_kernels._C_{isa}")
        except ModuleNotFoundError:  # not every platform builds every instruction set
            reason = f"the compiled CPU kernels were not built for {isa}"
            continue
        except ImportError as error:
            return _told(f"the compiled CPU kernels ({isa}) did not load under torch {torch.__version__}: {error}")
        facts.update(library.facts())
        return None
    return reason


def _installed_elsewhere() -> Path | None:
    """The folder of an installed package, where Python took another one: that of a source tree which it was started in."""
    for installed in metadata.distributions(name="segnext-kernels"):
        place = Path(str(installed.locate_file("segnext_kernels")))
        if (place / "__init__.py").exists() and not place.samefile(_HERE):
            return place
    return None


def _worth_using(features: list[str]) -> list[str]:
    """The libraries, but for dot products of bfloat16 where multiply-adds of float32 make more products in the same time."""
    return [isa for isa in _LIBRARIES if not (isa == "avx512_bf16" and "slow-avx512bf16" in features)]


def _of_another_version(processor: ModuleType | None) -> bool:
    """Whether an older build left the libraries, which would take arguments for others. ``_cpu``, which is built with them,
    tells: they themselves register their kernels as soon as they are loaded."""
    return processor is not None and getattr(processor, "INTERFACE", None) != INTERFACE


def _told(reason: str) -> str:
    """Warns: whoever has built kernels expects them to be used."""
    warnings.warn(f"segnext_kernels: {reason}; slower backends are used instead", stacklevel=2)
    return reason


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if _of_another_version(sys.modules.get("segnext_kernels._cpu")):
        return _ANOTHER_VERSION  # which was told
    try:
        library = importlib.import_module("segnext_kernels._C_cuda")
    except ModuleNotFoundError:
        return (
            "the CUDA kernels were not built: that takes nvcc of torch's CUDA version at installation"
            f" (CUDA_HOME names the toolkit, {CUDA_VARIABLE}=1 makes its lack an error)"
        )
    except ImportError as error:
        return _told(f"the CUDA kernels did not load under torch {torch.__version__}: {error}")
    found = library.facts()
    global cuda_version
    cuda_version = found["cuda"]
    cuda_architectures.extend(found["architectures"].split())
    return None


def cuda_driver() -> int:
    """The newest CUDA that the driver knows. It begins to work in this process then, which must not happen at import: where
    the process is forked afterwards, its children could use no GPU."""
    return importlib.import_module("segnext_kernels._C_cuda").driver()


@functools.cache
def why_not_on_gpu(index: int) -> str | None:
    """Why the CUDA kernels do not run on this GPU, or None if they do."""
    own, cuda, driver = torch.cuda.get_device_capability(index), cuda_version, cuda_driver()
    old = (
        f"the CUDA kernels were built with CUDA {cuda // 1000}.{cuda % 1000 // 10}, which this driver is too old for (it knows"
        f" CUDA {driver // 1000}.{driver % 1000 // 10}): update it, or rebuild with an older toolkit"
    )
    if driver // 1000 < cuda // 1000:
        return old
    reason = f"the CUDA kernels were built for {', '.join(cuda_architectures)}, this GPU is {own[0]}.{own[1]}"
    for name in cuda_architectures:
        number = name.removesuffix("+PTX")
        built = tuple(map(int, number.rstrip("a").split(".")))
        if built != own and (built > own or number.endswith("a")):
            continue
        if built[0] == own[0]:
            return None
        if name.endswith("+PTX"):  # which the driver compiles, if it is not older than what made it
            if driver >= cuda:
                return None
            reason = old
    return reason


_wanted = os.environ.get(ISA_VARIABLE)
failure = _load(_wanted)  # why there are no compiled CPU kernels; None where they are loaded
if _wanted and failure:
    raise ImportError(f"{ISA_VARIABLE}={_wanted}: {failure}")
cuda_failure = _load_cuda()  # why there are no CUDA kernels; None where they are loaded
