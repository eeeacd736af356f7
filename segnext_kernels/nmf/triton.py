"""nmf in Triton: one pass over x for every update of both factors, forward and backward.

``step`` reads a tile of x, all D rows and some columns, once: it updates the columns' coefficients and, from the same tile,
adds up x C over the columns of a program, then C^T C. ``finish`` adds the programs' sums in their order, updates the bases, and
leaves B^T B for the next step. The first step begins with the softmax, whose logits x^T B are also the products of its update;
the last update of C and y = B C^T are a pass of their own. That is 2 steps + 2 launches and steps + 1 reads of x.

Where the sums of all D rows don't fit into registers (D R > 16384), a program adds them up some rows at a time, reading its
columns of x a second time, mostly from the L2; so do the programs that go back. Keeping x on the chip through all steps would
take a barrier between programs that all are resident, which Triton does not promise, so there is no such version.

Backward does the forward steps again and keeps all factors: (steps + 2) N R + (2 steps + 1) D R floats for each matrix, and
about as many for the gradients of the products. ``step_backward`` goes back through an update of the coefficients,
``finish_backward`` through one of the bases. The gradient of x is a sum of products of rank R, two for each step;
``gradient_of_x`` adds them up at the end, so that it is written once. "one_step" keeps nothing of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from .._triton import config, launch, power_of_2
from ._backward import finish_backward, gradient_of_x, step_backward
from ._forward import approximate, finish, step

PROGRAMS = 128  # that fill a GPU
LEAST_PARTS = 4  # programs for one matrix, however many matrices there are
PART = 64  # columns of a program are a multiple of this, and of every configuration's tile
BLOCK = 32  # rows of a program that finishes a step
HELD = 16384  # elements of x, and sums, that a program holds in registers


@dataclass(frozen=True)
class Problem:
    """The sizes of a decomposition and how it is cut."""

    batch: int
    rows: int
    columns: int
    rank: int
    precision: str

    @staticmethod
    def of(x: Tensor, bases: Tensor) -> Problem:
        batch, rows, columns = x.shape
        return Problem(batch, int(rows), int(columns), int(bases.shape[2]), _precision(x))

    @property
    def part(self) -> int:
        """Columns of a program."""
        tiles = triton.cdiv(self.columns, PART)
        return PART * triton.cdiv(tiles, max(LEAST_PARTS, triton.cdiv(PROGRAMS, self.batch)))

    @property
    def parts(self) -> int:
        return triton.cdiv(self.columns, self.part)

    @cached_property
    def of_factors(self) -> dict[str, object]:
        """The constants of every kernel."""
        return {"rank": self.rank, "RANK": power_of_2(self.rank, at_least=16), "PRECISION": self.precision}

    @cached_property
    def constants(self) -> dict[str, object]:
        """Those of the kernels that read x."""
        widest = 64 if self.precision != "ieee" and self.rank <= 64 else 32
        if self.precision == "ieee" and self.held and torch.version.hip is None:
            widest = 16  # without tensor cores a product has its operands in registers
        chunk = min(power_of_2(self.rows, at_least=16), widest)
        sizes = {"rows": self.rows, "columns": self.columns, "blocks": self.blocks}
        return self.of_factors | sizes | {"ROWS": chunk, "CHUNKS": triton.cdiv(self.rows, chunk)}

    @property
    def held(self) -> bool:
        """Whether a program of a step holds its tile of x and the sums in registers."""
        return power_of_2(self.rows) * self.of_factors["RANK"] <= HELD

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.rows, BLOCK)

    # Beyond these, one target's compiler or another's keeps something in memory instead of registers.

    @cached_property
    def configs(self) -> list[triton.Config]:
        """Of ``step``."""
        return [config(8, COLUMNS=32)]

    @cached_property
    def configs_of_output(self) -> list[triton.Config]:
        """Of ``approximate``."""
        return [config(8, registers=255, COLUMNS=columns) for columns in (32, 16)]

    @cached_property
    def configs_backward(self) -> list[triton.Config]:
        """Of ``step_backward``."""
        return [config(8, registers=255, COLUMNS=16 if self.rank > 32 else 32)]

    @cached_property
    def configs_of_tiles(self) -> list[triton.Config]:
        """Of ``gradient_of_x``."""
        return [config(8, registers=255, ROWS=32, COLUMNS=columns) for columns in (64, 32)]

    @cached_property
    def configs_of_blocks(self) -> list[triton.Config]:
        """Of ``finish`` and ``finish_backward``."""
        return [config(8 if self.rank > 64 else 4, ROWS=BLOCK)]

    def grid(self, meta: dict[str, int]) -> tuple[int, int]:
        return self.batch, self.parts

    def grid_of_tiles(self, meta: dict[str, int]) -> tuple[int]:
        return (self.batch * triton.cdiv(self.rows, meta["ROWS"]) * triton.cdiv(self.columns, meta["COLUMNS"]),)

    def grid_of_blocks(self, meta: dict[str, int]) -> tuple[int, int]:
        return self.batch, self.blocks


def _precision(x: Tensor) -> str:
    """How matrix products are done: of 16-bit x on tensor cores without loss, of float32 as torch's setting allows.

    AMD's matrix cores have float32 itself.
    """
    if torch.version.hip is not None:
        return "ieee"
    if x.dtype != torch.float32:
        return "split"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@dataclass
class Factors:
    """The factors of the last step, or of all of them, first dimension the step."""

    coef: Tensor  # [steps + 2 or 1, B, N, R]; backward finds the last ones
    bases: Tensor  # [steps + 1 or 1, B, D, R]
    grams: Tensor  # [steps + 1 or 1, B, blocks, R, R], whose sums are B^T B
    scratch: Tensor  # [B, 2 programs, R, R], in which a program passes squares between its threads
    products: Tensor  # [steps or 1, B, D, R], x C
    squares: Tensor  # [steps or 1, B, parts, R, R], whose sums are C^T C


def run(problem: Problem, x: Tensor, bases: Tensor, steps: int, keep: bool) -> Factors:
    """All steps but the last update of the coefficients; with ``keep`` the factors of all steps are kept."""
    p, stored = problem, steps if keep else 0
    factors = Factors(
        *(
            bases.new_empty(shape)
            for shape in (
                (stored + 2 if keep else 1, p.batch, p.columns, p.rank),
                (stored + 1, p.batch, p.rows, p.rank),
                (stored + 1, p.batch, p.blocks, p.rank, p.rank),
                (p.batch, 2 * max(p.parts, p.blocks), p.rank, p.rank),
                (max(stored, 1), p.batch, p.rows, p.rank),
                (max(stored, 1), p.batch, p.parts, p.rank, p.rank),
            )
        )
    )
    sums = bases.new_empty((p.batch, p.parts, p.rows, p.rank))
    _finish(p, bases, sums, factors, 0, FIRST=True, KEEP=keep)
    for i in range(steps):
        read, write = (i, i + 1) if keep else (0, 0)
        launch(
            wrap_triton(step),
            p.grid,
            x,
            factors.coef,
            factors.bases,
            factors.grams,
            sums,
            factors.squares,
            factors.scratch,
            read,
            write,
            p.batch,
            p.part,
            *x.stride(),
            **p.constants,
            HELD=p.held,
            FIRST=i == 0,
            configs=p.configs,
            key=("rows", "rank"),
            restore=("coef",),
        )
        _finish(p, bases, sums, factors, read, FIRST=False, KEEP=keep)
    return factors


def _finish(p: Problem, bases: Tensor, sums: Tensor, factors: Factors, slot: int, **constants: bool) -> None:
    launch(
        wrap_triton(finish),
        p.grid_of_blocks,
        bases,
        sums,
        factors.squares,
        factors.bases,
        factors.grams,
        factors.products,
        factors.scratch,
        slot,
        p.batch,
        p.rows,
        p.parts,
        **p.of_factors,
        **constants,
        configs=p.configs_of_blocks,
    )


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


def backward(
    grad_out: Tensor, x: Tensor, bases: Tensor, steps: int, gradient: str, need_x: bool, need_bases: bool
) -> tuple[Tensor, Tensor]:
    exact = gradient == "exact"
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_bases = bases.new_empty(0)
    if need_bases:
        grad_bases = torch.empty_like(bases) if exact and x.numel() > 0 else torch.zeros_like(bases)
    if x.numel() > 0 and (need_x or (need_bases and exact)):
        p = Problem.of(x, bases)
        factors = run(p, x, bases, steps, keep=exact)
        last = len(factors.bases) - 1
        back = _Back(p, bases, last + 1)
        for i in range(last, -1, -1):
            kind = {"LAST": i == last, "FIRST": steps == 0, "SOFTMAX": exact and i == 0, "EXACT": exact}
            _step_back(p, back, grad_out, x, factors, i, **kind)
            if exact:
                _finish_back(p, back, factors, grad_bases if i == 0 and need_bases else back.carry, i, LAST=i == last)
        if need_x:
            launch(
                wrap_triton(gradient_of_x),
                p.grid_of_tiles,
                grad_x,
                factors.coef,
                factors.bases,
                back.grad_logits,
                back.grad_products,
                last,
                p.batch,
                *grad_x.stride(),
                rows=p.rows,
                columns=p.columns,
                **p.of_factors,
                configs=p.configs_of_tiles,
                key=("rank",),
            )
    return grad_x, grad_bases


class _Back:
    """What the way back holds."""

    def __init__(self, p: Problem, bases: Tensor, slots: int) -> None:
        self.grad_coef = bases.new_empty((p.batch, p.columns, p.rank))  # of the coefficients after the update at hand
        self.grad_quotients = torch.empty_like(self.grad_coef)  # of C B^T B in that update
        self.grad_logits = bases.new_empty((slots, p.batch, p.columns, p.rank))  # of x^T B in every step
        self.grad_products = bases.new_empty((slots, p.batch, p.rows, p.rank))  # of x C; slot i + 1 is step i's
        self.grad_squares = bases.new_empty((p.batch, p.blocks, p.rank, p.rank))  # of C^T C, a part for each block of rows
        self.carry = bases.new_empty((p.batch, p.rows, p.rank))  # of the bases before an update, directly
        self.sums = bases.new_empty((p.batch, p.parts, p.rows, p.rank))
        self.squares = bases.new_empty((p.batch, p.parts, p.rank, p.rank))


def _step_back(p: Problem, back: _Back, grad_out: Tensor, x: Tensor, factors: Factors, slot: int, **constants: bool) -> None:
    launch(
        wrap_triton(step_backward),
        p.grid,
        x,
        grad_out,
        factors.coef,
        factors.bases,
        factors.grams,
        back.grad_coef,
        back.grad_quotients,
        back.grad_logits,
        back.grad_products,
        back.grad_squares,
        back.sums,
        back.squares,
        factors.scratch,
        slot,
        p.batch,
        p.part,
        *x.stride(),
        *grad_out.stride(),
        **p.constants,
        **constants,
        configs=p.configs_backward,
        key=("rows", "rank"),
        restore=("grad_coef",),
    )


def _finish_back(p: Problem, back: _Back, factors: Factors, out: Tensor, slot: int, **constants: bool) -> None:
    launch(
        wrap_triton(finish_backward),
        p.grid_of_blocks,
        out,
        back.sums,
        back.squares,
        factors.bases,
        factors.products,
        factors.squares,
        back.grad_products,
        back.grad_squares,
        back.carry,
        factors.scratch,
        slot,
        p.batch,
        p.rows,
        p.parts,
        **p.of_factors,
        FIRST=slot == 0,
        **constants,
        configs=p.configs_of_blocks,
    )
