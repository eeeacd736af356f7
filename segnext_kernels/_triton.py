"""What the operators' Triton kernels share: whether Triton is there, how they are registered, how they are launched."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

try:
    import triton
    from triton.runtime.jit import JITFunction

    # Why there are no Triton kernels; None where there are
    failure = None if hasattr(triton, "knobs") else f"Triton {triton.__version__} is too old: 3.4 or newer is needed"
except ImportError as error:
    failure = f"Triton is not installed ({error})"

NAMESPACE = "segnext_kernels_triton"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_tuned: dict[tuple, Callable] = {}
_tuning = threading.RLock()

# Under TRITON_INTERPRET=1, read when Triton is imported, the kernels run on CPU tensors, as NumPy, one program after another.
interpreted = failure is None and bool(triton.knobs.runtime.interpret)


def kernels(package: str) -> ModuleType | None:
    """The Triton kernels of an operator, the module ``triton`` in its package; None without Triton."""
    return importlib.import_module(".triton", package) if failure is None else None


def define(schema: str, function: Callable, fake: Callable) -> torch.library.Library:
    """Registers ``function``, which launches kernels, as an operator that torch.compile sees through.

    The interpreter's kernels cannot be traced: there the operator is opaque, and where there is no GPU to compile for, since
    the other way imports all of Inductor, which takes longer than everything else here.
    """
    name, signature = schema[: schema.index("(")], schema[schema.index("(") :]
    opaque = interpreted or torch.cuda.device_count() == 0
    make = torch.library.custom_op if opaque else torch.library.triton_op
    make(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=signature).register_fake(fake)
    return _library


def wrap_triton(kernel):
    """``torch.library.wrap_triton``, which in older torch refuses kernels that are interpreted."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def launch(
    kernel,
    grid: Callable[[dict], tuple],
    *args,
    configs: Sequence[triton.Config],
    key: Sequence[str] = (),
    restore: Sequence[str] = (),
    **constants,
) -> None:
    """Launches a kernel in the first of its configurations; with ``torch.backends.cudnn.benchmark`` in the fastest.

    Args:
        kernel: from :func:`wrap_triton`.
        grid: the number of programs, from the configuration's values.
        args: of the kernel, the first a tensor on the device to run on.
        configs: the first must be a sensible choice for the problem.
        key: names of the arguments that make another problem, to be tuned again.
        restore: names of the tensors that the kernel both reads and writes, for tuning runs it many times.
        constants: of the kernel, by name.
    """
    first = configs[0]
    if not isinstance(kernel, JITFunction):  # traced, which takes no other options, or interpreted
        kernel[grid](*args, **constants, **first.kwargs, num_warps=first.num_warps, num_stages=first.num_stages)
        return
    with torch.cuda.device_of(args[0]):
        if torch.backends.cudnn.benchmark and len(configs) > 1:
            with _tuning:  # an autotuner keeps the call that it is at
                _autotuner(kernel, configs, key, restore)[grid](*args, **constants)
        else:
            kernel[grid](*args, **constants, **first.all_kwargs())


def _autotuner(kernel, configs: Sequence[triton.Config], key: Sequence[str], restore: Sequence[str]) -> Callable:
    identity = (kernel, torch.cuda.current_device(), *map(str, configs))
    if identity not in _tuned:
        tune = triton.autotune(list(configs), list(key), restore_value=list(restore), cache_results=True)
        _tuned[identity] = tune(kernel)
    return _tuned[identity]


def config(warps: int, registers: int | None = None, **values: int) -> triton.Config:
    """A configuration without software pipelining, which could move loads before stores that they depend on.

    Loops that only load what no thread of theirs stores have it by ``tl.range(num_stages=...)``.

    With ``registers`` NVIDIA's assembler gives a thread so many rather than spill for more warps.
    """
    return triton.Config(values, num_warps=warps, num_stages=1, maxnreg=registers if torch.version.hip is None else None)


def ceil_div(a: int, b: int) -> int:
    """``triton.cdiv``, which takes a hundred times as long where it is called outside of kernels."""
    return -(-a // b)


def power_of_2(number: int, at_least: int = 1) -> int:
    """The smallest power of two that is no less than both, by comparisons: a size may be one that torch.compile keeps open."""
    power = at_least
    while power < number:
        power *= 2
    return power


def capability(x: Tensor) -> tuple[int, int]:
    """Of the GPU that x is on; where there is none, the least that Triton serves."""
    return _capability_of(x.get_device()) if x.is_cuda else (8, 0)


def untraced(function: Callable) -> Callable:
    """What ``torch.compiler.assume_constant_result`` makes: torch.compile takes its result, such as a driver's answer, for a
    constant. That imports all of Dynamo, which takes longer than everything else here."""
    function._dynamo_marked_constant = True
    return function


@untraced
def _capability_of(index: int) -> tuple[int, int]:
    return _capability(index) if has_gpu() else (8, 0)


def architecture(x: Tensor) -> str:
    """AMD's name of the GPU that x is on; where there is none, that of what Triton serves."""
    return _architecture_of(x.get_device()) if x.is_cuda else "gfx942"


@untraced
def _architecture_of(index: int) -> str:
    return torch.cuda.get_device_properties(index).gcnArchName if has_gpu() else "gfx942"


_capability = functools.cache(torch.cuda.get_device_capability)
has_gpu = functools.cache(torch.cuda.is_available)  # which asks the driver every time


def is_channels_last(x: Tensor) -> bool:
    """Whether an image's channels lie together; where both layouts fit, as with one channel, it is contiguous."""
    return not x.is_contiguous()
