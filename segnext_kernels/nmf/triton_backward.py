"""The gradients of nmf in Triton; their kernels are in _backward.py.

Backward does the forward steps again and keeps all factors: (steps + 2) N R + (2 steps + 1) D R floats for each matrix, and
about as many for the gradients of the products. ``step_backward`` goes back through an update of the coefficients,
``finish_backward`` through one of the bases. The gradient of x is a sum of products of rank R, two for each step;
``gradient_of_x`` adds them up at the end, so that it is written once. "one_step" keeps nothing of the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import launch, wrap_triton
from ._backward import finish_backward, gradient_of_x, step_backward
from ._steps import Factors, Problem, run


def backward(
    grad_out: Tensor,
    x: Tensor,
    bases: Tensor,
    factors: Tensor | None,
    steps: int,
    gradient: str,
    need_x: bool,
    need_bases: bool,
) -> tuple[Tensor, Tensor]:
    exact = gradient == "exact"
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_bases = bases.new_empty(0)
    if need_bases:
        grad_bases = torch.empty_like(bases) if exact and x.numel() > 0 else torch.zeros_like(bases)
    if x.numel() > 0 and (need_x or (need_bases and exact)):
        p = Problem.of(x, bases)
        made = run(p, x, bases, steps, keep=exact)
        last = len(made.bases) - 1
        back = _Back(p, bases, last + 1)
        for i in range(last, -1, -1):
            kind = {"LAST": i == last, "FIRST": steps == 0, "SOFTMAX": exact and i == 0, "EXACT": exact}
            _step_back(p, back, grad_out, x, made, i, **kind)
            if exact:
                _finish_back(p, back, made, grad_bases if i == 0 and need_bases else back.carry, i, LAST=i == last)
        if need_x:
            launch(
                wrap_triton(gradient_of_x),
                p.grid_of_tiles,
                grad_x,
                made.coef,
                made.bases,
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
        key=("rows", "rank", "part"),
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
