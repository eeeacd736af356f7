"""Finds and loads the compiled library that fits this processor; says what is missing and why."""

from __future__ import annotations

import importlib
import os

import torch

# From the best to the plainest, with the processor features (GCC's names) that each library was compiled for.
_LIBRARIES = {
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "baseline": (),
}
ISA_VARIABLE = "SEGNEXT_KERNELS_ISA"
BUILD_VARIABLE = "SEGNEXT_KERNELS_COMPILE"

failure: str | None = None  # why there are no compiled CPU kernels; None where they are loaded
facts: dict[str, str] = {}  # what the loaded library says of its own build


def _load() -> None:
    global failure
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted and wanted not in _LIBRARIES:
        raise ImportError(f"{ISA_VARIABLE}={wanted}: there is no such instruction set; there are {', '.join(_LIBRARIES)}")
    try:
        features = importlib.import_module("segnext_kernels._cpu").features()
    except ModuleNotFoundError:
        failure = (
            f"the compiled CPU kernels were not built (installed with {BUILD_VARIABLE}=0);"
            " reinstall with a C++ compiler and without that variable"
        )
        return
    for isa, required in _LIBRARIES.items():
        if wanted and isa != wanted:
            continue
        missing = [name for name in required if name not in features]
        if missing and wanted:
            raise ImportError(f"{ISA_VARIABLE}={wanted}: this processor lacks {', '.join(missing)}")
        if missing:
            continue
        try:
            library = importlib.import_module(f"segnext_kernels._C_{isa}")
        except ModuleNotFoundError:
            continue  # not every platform builds every instruction set
        except ImportError as error:
            failure = f"the compiled CPU kernels ({isa}) did not load under torch {torch.__version__}: {error}"
            return
        facts.update(library.facts())
        return
    failure = f"no compiled CPU kernels were built for {wanted or 'this processor'}"


_load()
