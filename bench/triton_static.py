"""What Triton's compiler makes of the kernels for GPUs that are not there: ``python -m bench triton-static``.

The operators are called on tensors without data; every launch is recorded with its arguments and all its configurations, and
compiled ahead of time. Registers, spills, shared memory and tensor core instructions are read from what came out.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .cuda_static import table_row, tool

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes for a block, at most
POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.float64: "fp64"}
TENSOR_CORES = r"\bmma\.sync|\bwgmma\.mma_async|\btcgen05\.mma|\bv_mfma_"


@dataclass(frozen=True)
class Launch:
    """One launch: where its kernel is found, the arguments by name, one configuration, and the number of programs."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, object], ...]  # (name, value); tensors as their type, such as "*fp32"
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class Compiled:
    kernel: str
    configuration: str
    target: str
    registers: int
    spills: int
    shared: int
    tensor_cores: int
    problem: str = ""  # why there is none

    @property
    def fits(self) -> bool:
        return not self.problem and self.spills == 0 and self.shared <= SHARED[self.target]


def record(call: Callable[[], object], hip: bool = False) -> list[list[Launch]]:
    """Runs ``call``, which calls operators' Triton functions, without a GPU; for every launch all its configurations."""
    launches: list[list[Launch]] = []
    with _recording(launches, hip), FakeTensorMode(), torch.device("cuda"):
        call()
    return launches


@contextmanager
def _recording(launches: list[list[Launch]], hip: bool) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    from segnext_kernels import _triton

    def run(kernel, *args, grid, warmup, **options):
        launches.append([_launch(kernel, args, options, grid)])

    class Every:
        """Stands for the autotuner."""

        def __init__(self, kernel, configs, key, restore):
            self.kernel, self.configs = kernel, configs

        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append(
                [_launch(self.kernel, args, constants | config.all_kwargs(), grid) for config in self.configs]
            )

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(_triton, "_autotuner", Every),
        mock.patch.object(torch.cuda, "device_of", mock.MagicMock()),
        torch.backends.cudnn.flags(enabled=True, benchmark=True),
        mock.patch.object(torch.version, "hip", "7.0" if hip else None),
        torch._library.triton.set_wrap_triton_enabled(False),
    ):
        yield


def _launch(kernel, args: tuple, options: dict[str, object], grid: Callable | tuple) -> Launch:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {name: v for name, v in options.items() if name in names}
    programs = grid(values) if callable(grid) else grid
    declared = {p.name for p in kernel.params if p.is_constexpr}
    arguments, constants = [], []
    for name in names:
        value = values[name]
        fixed = name in declared or value is None or (value is True or value is False)
        same = kernel.params[names.index(name)].do_not_specialize
        if fixed or (type(value) is int and value == 1 and not same):
            constants.append((name, value))
        else:
            arguments.append((name, _type(value, specialize=not same)))
    return Launch(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(arguments),
        tuple(constants),
        options["num_warps"],
        options["num_stages"],
        math.prod(programs),
    )


def _type(value: object, specialize: bool) -> tuple[str, bool]:
    """An argument's type for Triton, and whether it is known to be a multiple of 16."""
    if isinstance(value, Tensor):
        return "*" + POINTERS[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if abs(value) < 2**31 else "i64"), specialize and value % 16 == 0


def compile_for(launch: Launch, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(launch.module), launch.kernel)
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr") | {name: kind for name, (kind, _) in launch.arguments}
    known = {(names.index(name),): [["tt.divisibility", 16]] for name, (_, multiple) in launch.arguments if multiple}
    source = ASTSource(kernel, signature=signature, constexprs=dict(launch.constants), attrs=known)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    try:
        made = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    except Exception as problem:  # the compiler's own, of many kinds
        return Compiled(launch.kernel, _describe(launch), target, 0, 0, 0, 0, _reason(problem))
    if "cubin" in made.asm:
        registers, spills = _resources(made.asm["cubin"])
        text = made.asm["ptx"]
    else:
        text = made.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    cores = len(re.findall(TENSOR_CORES, text))
    return Compiled(launch.kernel, _describe(launch), target, registers, spills, made.metadata.shared, cores)


def _reason(problem: BaseException) -> str:
    """What the compiler says in its innermost function."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return " ".join(str(problem).split())[-200:]


def _describe(launch: Launch) -> str:
    constants = {name: value for name, value in launch.constants if name.isupper()}
    kind = launch.arguments[0][1][0].removeprefix("*")
    return f"{kind} {launch.warps} warps " + " ".join(f"{name}={value}" for name, value in constants.items())


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory: those are spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", printed.stdout).groups()
    return int(registers), int(stack) + int(local)

