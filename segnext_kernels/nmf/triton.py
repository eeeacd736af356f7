"""nmf in Triton: one pass over x for every update of both factors.

``step`` reads a tile of x, all D rows and some columns, once: it updates the columns' coefficients and, from the same tile,
adds up x C over the columns of a program, then C^T C. ``finish`` adds the programs' sums in their order, updates the bases, and
leaves B^T B for the next step. The first step begins with the softmax, whose logits x^T B are also the products of its update;
the last update of C and y = B C^T are a pass of their own. That is 2 steps + 2 launches and steps + 1 reads of x.

Where a tile and the sums of all D rows don't fit into registers (D > 256, R > 16, or float32 on NVIDIA's GPUs), and in 16 bits
on those after sm_8x, where few warps are faster, a program adds them up some rows at a time, reading its columns of x a second
time; so do the programs that go back. See ``traffic`` for what memory has of that.
Keeping x on the chip through all steps would take a barrier between programs that all are resident, which Triton does not
promise, so there is no such version.

The kernels are in _forward.py, _steps.py launches those of a step; backward is in triton_backward.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import ceil_div, launch, wrap_triton
from ._forward import approximate
from ._steps import HELD, Problem, run
from .triton_backward import backward  # noqa: F401  the operator's other half


def forward(x: Tensor, bases: Tensor, steps: int, gradient: str, round_factors: bool = False) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() > 0:
        p = Problem.of(x, bases, round_factors)
        factors = run(p, x, bases, steps, keep=False)
        launch(
            wrap_triton(approximate),
            p.grid,
            x,
            y,
            factors.coef,
            factors.bases,
            factors.grams,
            factors.scratch,
            p.part,
            *x.stride(),
            *y.stride(),
            **p.constants,
            FIRST=steps == 0,
            configs=p.configs_of_output,
            key=("rows", "rank", "part"),
            restore=("coef",),
        )
    return y


class Traffic(NamedTuple):
    """What forward moves, but for the reads in bytes of x."""

    reads: int  # of x
    again: int  # of these, by a program that has read the same in the same launch, so long ago that the L2 may have lost it
    memory: float  # everything once for each launch that touches it: what is read again is in the L2
    cache: float  # everything as often as programs read and write it


def traffic(shape: Sequence[int], rank: int, steps: int, itemsize: int, later: bool = False) -> Traffic:
    """As the kernels' loops have it, on sm_8x or a ``later`` GPU of NVIDIA's. Programs run together, and each reads all its
    columns before it begins again: where there are no more than fill a GPU, the L2 holds what is read again only if it is
    larger than all of x [B, D, N]."""
    half = itemsize == 2
    held = 0 if later else HELD
    p = Problem(*shape, rank, "split" if half else "tf32x3", most_held=held, large=half and later, lean=half)
    x, coef, bases, gram = (4 * size for size in (p.rows * p.columns, p.columns * rank, p.rows * rank, rank * rank))
    x = x * itemsize // 4
    twice = 0 if p.held else steps
    step = 2 * coef + bases + p.blocks * gram + p.parts * (bases + gram)
    finish = p.parts * (bases + gram) + 2 * bases + p.blocks * gram
    once = steps * (step + finish) + finish + coef + bases + p.blocks * gram

    pieces, chunks = ceil_div(rank, 32), p.constants["CHUNKS"]
    tiles, tiles_of_output = (ceil_div(p.columns, c[0].kwargs["COLUMNS"]) for c in (p.configs, p.configs_of_output))
    of_square = p.parts * (p.blocks + 1) * gram  # the sum of B^T B's parts
    update = 3 * coef + of_square  # C B^T B, C; for every tile x^T B
    step = tiles * (bases + gram) + update + (1 + pieces) * coef + (0 if p.held else chunks * coef) + p.parts * (bases + gram)
    finish = p.parts * bases + p.blocks * (p.parts + 3) * gram + (4 + pieces) * bases
    last = tiles_of_output * (2 * bases + gram) + update + chunks * coef
    every = steps * (step + finish) + finish + last
    again = 0 if p.programs > p.together else twice
    return Traffic(steps + 1 + twice, again, steps + 2 + once / x, steps + 2 + twice + every / x)
