"""The registry of benchmark cases: what is computed, on what inputs, by whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import segnext_kernels
from segnext_kernels.dwconv_gelu.reference import dwconv_gelu as dwconv_gelu_reference
from segnext_kernels.msca_strips.reference import msca_strips as msca_strips_reference
from segnext_kernels.nmf.reference import nmf as nmf_reference

from . import plain

LAYOUTS = ("contiguous", "channels_last")
BRANCHES = (7, 11, 21)
T_STAGES = ((32, 128), (64, 64), (160, 32), (256, 16))  # channels, side of the feature map of a 512 x 512 image
B_STAGES = ((64, 128), (128, 64), (320, 32), (512, 16))
T_MLPS = ((256, 128), (512, 64), (640, 32), (1024, 16))


class Work(NamedTuple):
    """What a direction needs at least: inputs read once and outputs written once; a multiply-accumulate is two operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Args:
        name: with the layout, what the report calls it.
        layout: of the case's first input, one of ``LAYOUTS``.
        build: makes the function of the case's inputs; compiling and exporting belong here.
        ours: whether the report compares it with the others, or others with it.
    """

    name: str
    layout: str
    build: Callable[[], Callable[..., Tensor]]
    ours: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.layout}"


@dataclass(frozen=True)
class Case:
    """One problem with everybody who solves it.

    Args:
        operator, shape, dtype: make up the name.
        setup: draws the inputs in float64, the same at every call; gradients are taken for all of them.
        reference: in float64 the truth; not timed.
        contenders: who is timed.
        work: the directions that are timed ("forward", "backward") and what each needs.
    """

    operator: str
    shape: str
    dtype: torch.dtype
    setup: Callable[[], list[Tensor]]
    reference: Callable[..., Tensor]
    contenders: tuple[Contender, ...]
    work: dict[str, Work]

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.shape}/{str(self.dtype).removeprefix('torch.')}"

    def inputs(self, layout: str = "contiguous", dtype: torch.dtype | None = None) -> list[Tensor]:
        """The inputs rounded to the case's dtype (and then cast to ``dtype``), the first in the layout; all need gradients."""
        first, *rest = (tensor.to(self.dtype).to(dtype or self.dtype) for tensor in self.setup())
        return [tensor.requires_grad_() for tensor in (lay_out(first, layout), *rest)]

    def grad_out(self, y: Tensor) -> Tensor:
        """The gradient that backward starts from, in y's dtype and layout."""
        drawn = torch.randn(y.shape, generator=generator(), dtype=torch.float64)
        return torch.empty_like(y).copy_(drawn.to(self.dtype))


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x [N, C, ...] with the last dimension fastest ("contiguous"), or its channels ("channels_last")."""
    return x.contiguous() if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def operator_contenders(fused: Callable[..., Tensor], plain: Callable[..., Tensor]) -> tuple[Contender, ...]:
    """The fused operator, what users write in plain PyTorch, and that compiled, each in both layouts."""
    compiled = partial(torch.compile, plain, fullgraph=True, dynamic=False)
    return tuple(
        Contender(name, layout, build, ours=name == "fused")
        for name, build in (("fused", lambda: fused), ("PyTorch", lambda: plain), ("torch.compile", compiled))
        for layout in LAYOUTS
    )


def msca_strips_case(channels: int, height: int, width: int, dtype: torch.dtype, batch: int = 1) -> Case:
    """msca_strips on [batch, channels, height, width]."""

    def setup() -> list[Tensor]:
        draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
        inputs = [draw(batch, channels, height, width), draw(channels, 1, 5, 5) / 5, draw(channels)]
        for k in BRANCHES:
            inputs += [draw(channels, 1, 1, k) / k**0.5, draw(channels), draw(channels, 1, k, 1) / k**0.5, draw(channels)]
        return inputs

    def fused(x: Tensor, *weights: Tensor) -> Tensor:
        return segnext_kernels.msca_strips(x, weights)

    def reference(x: Tensor, *weights: Tensor) -> Tensor:
        return msca_strips_reference(x, weights)

    pixels = batch * channels * height * width
    filters = channels * (25 + 1 + 2 * (sum(BRANCHES) + len(BRANCHES)))
    flops = 2 * pixels * (25 + 2 * sum(BRANCHES))
    return Case(
        "msca_strips",
        _image(batch, channels, height, width),
        dtype,
        setup,
        reference,
        operator_contenders(fused, plain.msca_strips),
        _convolution_work(pixels, filters, flops, dtype),
    )


def dwconv_gelu_case(channels: int, height: int, width: int, dtype: torch.dtype, batch: int = 1) -> Case:
    """dwconv_gelu on [batch, channels, height, width]; GELU's own operations are not counted."""

    def setup() -> list[Tensor]:
        draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
        return [draw(batch, channels, height, width), draw(channels, 1, 3, 3) / 3, draw(channels)]

    pixels = batch * channels * height * width
    return Case(
        "dwconv_gelu",
        _image(batch, channels, height, width),
        dtype,
        setup,
        dwconv_gelu_reference,
        operator_contenders(segnext_kernels.dwconv_gelu, plain.dwconv_gelu),
        _convolution_work(pixels, 10 * channels, 18 * pixels, dtype),
    )


def nmf_case(depth: int, pixels: int, rank: int, steps: int, direction: str, dtype: torch.dtype = torch.float32) -> Case:
    """nmf of [1, depth, pixels] in one direction, the exact gradient where that is backward."""

    def setup() -> list[Tensor]:
        draw = partial(torch.rand, generator=generator(), dtype=torch.float64)
        return [draw(1, depth, pixels), torch.nn.functional.normalize(draw(1, depth, rank), dim=1)]

    def fused(x: Tensor, bases: Tensor) -> Tensor:
        return segnext_kernels.nmf(x, bases, steps)

    def reference(x: Tensor, bases: Tensor) -> Tensor:
        return nmf_reference(x, bases, steps)

    product = 2 * depth * pixels * rank  # of x or y with a factor
    gram = 2 * (depth + pixels) * rank * rank  # of a factor with itself, and of that with the other factor
    forward = Work((2 * depth * pixels + depth * rank) * dtype.itemsize, (3 + 2 * steps) * product + (1 + 2 * steps) * gram)
    backward = Work((3 * depth * pixels + 2 * depth * rank) * dtype.itemsize, 2 * forward.flops)
    return Case(
        "nmf",
        f"{depth}x{pixels}-r{rank}-{steps}steps",
        dtype,
        setup,
        reference,
        operator_contenders(fused, partial(plain.nmf, steps=steps)),
        {direction: {"forward": forward, "backward": backward}[direction]},
    )


def _image(batch: int, channels: int, height: int, width: int) -> str:
    return "x".join(map(str, (batch, channels, height, width)[batch == 1 :]))


def _convolution_work(pixels: int, filters: int, flops: int, dtype: torch.dtype) -> dict[str, Work]:
    """Backward makes two products for each one of forward; that some do forward again is not counted."""
    return {
        "forward": Work((2 * pixels + filters) * dtype.itemsize, flops),
        "backward": Work((3 * pixels + 2 * filters) * dtype.itemsize, 2 * flops),
    }


def _registry() -> Iterable[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for channels, side in (*T_STAGES, *B_STAGES):
            yield msca_strips_case(channels, side, side, dtype)
    for dtype in dtypes:
        for channels, side in T_MLPS:
            yield dwconv_gelu_case(channels, side, side, dtype)
    for depth, rank in ((256, 16), (1024, 64)):
        yield nmf_case(depth, 4096, rank, 7, "forward")
        yield nmf_case(depth, 4096, rank, 6, "backward")


CASES: dict[str, Case] = {case.name: case for case in _registry()}


def select(pattern: str = "*") -> list[Case]:
    """The registered cases whose name contains the shell pattern; ValueError if there is none."""
    found = [case for name, case in CASES.items() if fnmatchcase(name, f"*{pattern}*")]
    if not found:
        raise ValueError(f"no benchmark case fits {pattern!r}; the first of {len(CASES)} is {next(iter(CASES))}")
    return found
