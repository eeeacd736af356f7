"""What Triton's compiler makes of the kernels for GPUs that are not there: ``python -m bench triton-static``.

The operators are called on tensors without data; every launch is recorded with its arguments and all its configurations, and
compiled ahead of time. Registers, spills, shared memory and tensor core instructions are read from what came out.
"""

from __future__ import annotations

import math
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from .cuda_static import resources, table_row

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes for a block, at most
POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
POINTERS |= {torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
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
    registers: int | None
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


def record(call: Callable[[], object], target: str = "sm_80") -> list[list[Launch]]:
    """Runs ``call``, which calls operators' Triton functions, without a GPU; for every launch all its configurations."""
    launches: list[list[Launch]] = []
    with _recording(launches, *TARGETS[target][:2]), FakeTensorMode(), torch.device("cuda"):
        call()
    return launches


@contextmanager
def _recording(launches: list[list[Launch]], backend: str, number: int | str) -> Iterator[None]:
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
        mock.patch.object(torch.version, "hip", "7.0" if backend == "hip" else None),
        mock.patch.object(_triton, "capability", lambda x: (9, 4) if backend == "hip" else divmod(number, 10)),
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
        options.get("maxnreg"),
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

    module = import_module(launch.module)
    kernel = getattr(module, launch.kernel)
    if TARGETS[target][0] == "hip":  # what is called instead of inlined is so on NVIDIA's GPUs alone
        called = [function for function in vars(module).values() if getattr(function, "noinline", None)]
    else:
        called = []
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr") | {name: kind for name, (kind, _) in launch.arguments}
    known = {(names.index(name),): [["tt.divisibility", 16]] for name, (_, multiple) in launch.arguments if multiple}
    source = ASTSource(kernel, signature=signature, constexprs=dict(launch.constants), attrs=known)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if launch.registers is not None:
        options["maxnreg"] = launch.registers
    try:
        with ExitStack() as stack:
            for function in called:
                stack.enter_context(mock.patch.object(function, "noinline", False))
            made = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    except Exception as problem:  # the compiler's own, of many kinds
        return Compiled(launch.kernel, _describe(launch), target, 0, 0, 0, 0, _reason(problem))
    if "cubin" in made.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            [(_, registers, spills)] = resources(Path(file.name))
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


def calls(dtype: torch.dtype, last: bool, whole: bool = True) -> dict[str, Callable[[], object]]:
    """For every operator a call forward and backward, on tensors of SegNeXt's sizes; ``last``: channels (rows) lie together.

    Without ``whole`` only the sizes of SegNeXt-T, otherwise also those of B and L, one that fits no tile, and a high rank.
    """
    from segnext_kernels.dwconv_gelu import triton as dwconv_gelu
    from segnext_kernels.msca_strips import triton as msca_strips
    from segnext_kernels.scale_add import triton as scale_add
    from segnext_kernels.upsample_argmax import triton as upsample_argmax
    from segnext_kernels.upsample_cross_entropy import triton as upsample_cross_entropy

    def image(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last if last else torch.contiguous_format)

    filters = torch.float32 if dtype == torch.bfloat16 else dtype  # as autocast has it; float16 with its own

    def strips(*shape: int) -> None:
        sizes = [(5, 5)] + [size for k in (7, 11, 21) for size in ((1, k), (k, 1))]
        c = shape[1]
        weights = [torch.empty(s, dtype=filters) for h, w in sizes for s in ((c, 1, h, w), (c,))]
        x = image(*shape)
        msca_strips.forward(x, weights)
        msca_strips.backward(x, x, weights, True, True)

    def mlp(*shape: int) -> None:
        x, weight, bias = image(*shape), torch.empty(shape[1], 1, 3, 3, dtype=filters), torch.empty(shape[1], dtype=filters)
        dwconv_gelu.forward(x, weight, bias)
        dwconv_gelu.backward(x, x, weight, bias, True, True)

    def residual(*shape: int) -> None:
        x, scale, keep = image(*shape), torch.empty(shape[1], dtype=dtype), torch.empty(shape[0])
        for kept in (keep, None):
            scale_add.forward(x, x, scale, kept)
            scale_add.backward(x, x, scale, kept, True, True)

    def loss(*shape: int) -> None:
        logits, target = image(*shape), torch.empty(shape[0], 8 * shape[2], 8 * shape[3], dtype=torch.int64)
        upsample_cross_entropy.forward(logits, target, None, 255)
        upsample_cross_entropy.backward(torch.empty(()), logits, target, None, 255)

    def labels(*shape: int) -> None:
        upsample_argmax.forward(image(*shape), 8 * shape[2], 8 * shape[3])

    chosen = {
        "msca_strips": (strips, [(16, 64, 64, 64), (16, 32, 128, 128), (1, 5, 9, 300)]),
        "dwconv_gelu": (mlp, [(16, 256, 128, 128), (16, 512, 64, 64), (1, 5, 9, 300)]),
        "nmf": (
            lambda *shape: decomposition(shape[:3], shape[3], dtype, last),
            [(16, 256, 4096, 16), (16, 512, 4096, 64), (16, 1024, 4096, 64), (1, 45, 70, 5), (16, 512, 4096, 128)],
        ),
        "scale_add": (residual, [(16, 32, 128, 128), (16, 160, 32, 32), (1, 5, 9, 300), (2, 64, 1, 1)]),
        "upsample_cross_entropy": (loss, [(16, 150, 64, 64), (2, 19, 128, 256), (1, 3, 9, 7)]),
        "upsample_argmax": (labels, [(16, 150, 64, 64), (2, 19, 128, 256), (1, 3, 9, 7)]),
    }
    return {
        name: lambda f=function, sizes=sizes: [f(*size) for size in (sizes if whole else sizes[:1])]
        for name, (function, sizes) in chosen.items()
    }


def decomposition(
    shape: tuple[int, int, int],
    rank: int,
    dtype: torch.dtype,
    last: bool = False,
    gradients: Sequence[str] = ("exact", "one_step"),
) -> None:
    """nmf forward, factors rounded too, and backward of x [B, D, N] without data; ``last``: a column's rows lie together."""
    from segnext_kernels.nmf import triton as nmf

    batch, rows, columns = shape
    x = torch.empty(batch, columns, rows, dtype=dtype).mT if last else torch.empty(shape, dtype=dtype)
    bases = torch.empty(batch, rows, rank)
    if dtype == torch.bfloat16:
        nmf.forward(x, bases, 2, "exact", True)
    for gradient in gradients:
        nmf.forward(x, bases, 2, gradient)
        nmf.backward(x, x, bases, None, 2, gradient, True, True)


def distinct(call: Callable[[], object], target: str) -> list[Launch]:
    """What has to be compiled for a call, each thing once."""
    launches = (launch for one in record(call, target) for launch in one)
    return list(dict.fromkeys(replace(launch, programs=0) for launch in launches))


def compile_all(jobs: Sequence[tuple[Launch, str]]) -> list[Compiled]:
    """Compiles on all processors, in processes that don't interpret."""
    deaf = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # the caller is interrupted
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), **deaf) as pool:
        return list(tqdm(pool.map(compile_for, *zip(*jobs, strict=True)), total=len(jobs)))


def report(case: str = "*", target: str = "*") -> str:
    """The kernels in all their configurations, as Markdown.

    Args:
        case, target: shell patterns of what :func:`calls` has and of ``TARGETS``; ValueError if nothing fits.
    """
    targets = matching("--target", target, TARGETS)
    jobs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for last in (False, True):
            every = calls(dtype, last)
            for name in matching("--case", case, every):
                jobs += [(launch, target) for target in targets for launch in distinct(every[name], target)]
    found = compile_all(list(dict.fromkeys(jobs)))
    columns = ("kernel", "configuration", "target", "registers", "spilled bytes", "shared bytes", "tensor core instructions")
    lines = ["# Triton kernels, compiled ahead of time", "", table_row(*columns, "fits"), "|" + "---|" * 8]
    for c in sorted(found, key=lambda c: (c.kernel, c.configuration, c.target)):
        fits = "yes" if c.fits else c.problem or "no"
        lines.append(table_row(c.kernel, c.configuration, c.target, c.registers, c.spills, c.shared, c.tensor_cores, fits))
    return "\n".join([*lines, "", *moved()] if case == target == "*" else lines)


def matching(option: str, pattern: str, names: Iterable[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"{option} {pattern}: there is none; there are {', '.join(names)}")
    return found


def moved() -> list[str]:
    """What the kernels move by their own arithmetic, as Markdown."""
    from segnext_kernels.msca_strips.triton import traffic as strips
    from segnext_kernels.msca_strips.triton_backward import traffic as strips_backward
    from segnext_kernels.nmf.triton import traffic as nmf
    from segnext_kernels.upsample_cross_entropy.triton_backward import strips as loss

    columns = ("operator", "size", "layout", "moved over what must be", "backward, from memory", "backward, of the programs")
    lines = ["## Bytes moved", "", table_row(*columns), "|" + "---|" * 6]
    for size, channels in ((512, (32, 64, 160, 256)), (1024, (64, 128, 320, 512))):
        for stage, c in enumerate(channels):
            for batch in (1, 16):
                shape = (batch, c, size >> (stage + 2), size >> (stage + 2))
                for last in (False, True):
                    layout = "channels_last" if last else "contiguous"
                    ratios = (f"{ratio:.2f}" for ratio in (strips(shape, last), *strips_backward(shape, last)))
                    lines.append(table_row("msca_strips", "x".join(map(str, shape)), layout, *ratios))
    columns = ("operator", "size", "dtype", "reads of x", "from memory, in reads of x", "of the programs", "x in MiB")
    lines += ["", table_row(*columns), "|" + "---|" * 7]
    kinds = (("float32", 4, False), ("16 bits, sm_80", 2, False), ("16 bits, later", 2, True))
    for batch, rows, rank in ((1, 256, 16), (16, 256, 16), (16, 512, 16), (1, 512, 64), (16, 512, 64), (16, 1024, 64)):
        for dtype, itemsize, later in kinds:
            t = nmf((batch, rows, 4096), rank, 7, itemsize, later)
            memory = f"{t.memory:.1f}" + (f" to {t.memory + t.again:.1f}" if t.again else "")
            size, mebibytes = f"{batch}x{rows}x4096, rank {rank}", batch * rows * 4096 * itemsize >> 20
            lines.append(table_row("nmf, 7 steps", size, dtype, t.reads, memory, f"{t.cache:.1f}", mebibytes))
    lines += ["", table_row("operator", "logits", "dtype", "allocated besides the gradient, in bytes of the logits")]
    lines.append("|" + "---|" * 4)
    for shape in ((16, 150, 64, 64), (8, 19, 128, 128), (16, 2, 64, 64)):
        for dtype, itemsize in (("float32", 4), ("16 bits", 2)):
            part = loss(shape, (8 * shape[2], 8 * shape[3]), itemsize).bytes / (math.prod(shape) * itemsize)
            lines.append(table_row("upsample_cross_entropy", "x".join(map(str, shape)), dtype, f"{part:.2f}"))
    return lines
