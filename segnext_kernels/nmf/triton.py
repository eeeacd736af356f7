"""nmf in Triton: one pass over x for every update of both factors.

``step`` reads a tile of x, all D rows and some columns, once: it updates the columns' coefficients and, from the same tile,
adds up x C over the columns of a program, then C^T C. ``finish`` adds the programs' sums in their order, updates the bases, and
leaves B^T B for the next step. The first step begins with the softmax, whose logits x^T B are also the products of its update;
the last update of C and y = B C^T are a pass of their own. That is 2 steps + 2 launches and steps + 1 reads of x.

Where the sums of all D rows don't fit into registers (D R > 16384), a program adds them up some rows at a time, reading its
columns of x a second time, mostly from the L2; so do the programs that go back. Keeping x on the chip through all steps would
take a barrier between programs that all are resident, which Triton does not promise, so there is no such version.

The kernels are in _forward.py, _steps.py launches those of a step; backward is in triton_backward.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import wrap_triton

from .._triton import launch
from ._forward import approximate
from ._steps import Problem, run
from .triton_backward import backward  # noqa: F401  the operator's other half


def forward(x: Tensor, bases: Tensor, steps: int, gradient: str) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() > 0:
        p = Problem.of(x, bases)
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
            key=("rows", "rank"),
            restore=("coef",),
        )
    return y


def traffic(shape: Sequence[int], rank: int, steps: int, itemsize: int) -> tuple[int, float]:
    """How often forward reads x, and all that it moves, the factors and y included, in reads of x.

    Everything counts once for each launch that touches it: what a program reads again is in its registers or the L2.
    """
    p = Problem(*shape, rank, "ieee")
    reads = steps * (1 if p.held else 2) + 1
    coef, bases, gram = p.columns * rank * 4, p.rows * rank * 4, rank * rank * 4
    step = 2 * coef + bases + p.blocks * gram + p.parts * (bases + gram)
    finish = p.parts * (bases + gram) + 2 * bases + p.blocks * gram
    factors = steps * (step + finish) + finish + coef + bases + p.blocks * gram
    x = p.rows * p.columns * itemsize
    return reads, reads + 1 + factors / x
