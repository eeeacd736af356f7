"""Finds and loads the compiled library that fits this processor; says what is missing and why."""

from __future__ import annotations

import importlib
import os

import torch

# From the best to the plainest, with the processor features (GCC's names) that each library was compiled for.
_LIBRARIES = {
    "amx_bf16": ("amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "avx2", "fma", "f16c"),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "baseline": (),
}
ISA_VARIABLE = "SEGNEXT_KERNELS_ISA"
BUILD_VARIABLE = "SEGNEXT_KERNELS_COMPILE"

facts: dict[str, str] = {}  # what the loaded library says of its own build


def _load(wanted: str | None) -> str | None:
    """Loads the wanted library, or the best that this processor can run; returns why there is none."""
    if wanted and wanted not in _LIBRARIES:
        return f"there is no such instruction set; there are {', '.join(_LIBRARIES)}"
    try:
        features = importlib.import_module("segnext_kernels._cpu").features()
    except ModuleNotFoundError:
        return (
            f"the compiled CPU kernels were not built ({BUILD_VARIABLE}=0, or a source tree that is not installed);"
            " reinstall with a C++ compiler and without that variable"
        )
    except ImportError as error:
        return f"the compiled CPU kernels did not load: {error}"
    for isa in [wanted] if wanted else _LIBRARIES:
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
            return f"the compiled CPU kernels ({isa}) did not load under torch {torch.__version__}: {error}"
        facts.update(library.facts())
        return None
    return reason


_wanted = os.environ.get(ISA_VARIABLE)
failure = _load(_wanted)  # why there are no compiled CPU kernels; None where they are loaded
if _wanted and failure:
    raise ImportError(f"{ISA_VARIABLE}={_wanted}: {failure}")
