"""The meaning of nmf in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def nmf(x: Tensor, bases: Tensor, steps: int, gradient: str = "exact", projection: Tensor | None = None) -> Tensor:
    """Multiplicative updates of x ~ bases coefᵀ, then their product, projected if wanted. See the public function."""
    bases, coef = factorise(x.to(bases.dtype), bases, steps, gradient)
    left = bases if projection is None else projection @ bases
    return (left @ coef.mT).to(x.dtype)


def factorise(x: Tensor, bases: Tensor, steps: int, gradient: str = "exact") -> tuple[Tensor, Tensor]:
    """Bases [B, D, R] and coefficients [B, N, R] after all updates."""
    given = bases
    with torch.set_grad_enabled(torch.is_grad_enabled() and gradient == "exact"):
        coef = torch.softmax(x.mT @ bases, dim=-1)
        for _ in range(steps):
            coef = coef * (x.mT @ bases) / (coef @ (bases.mT @ bases) + EPS)
            bases = bases * (x @ coef) / (bases @ (coef.mT @ coef) + EPS)
    if gradient == "one_step":
        coef = coef.detach()  # forward mode's derivatives, too, begin here
        # Those of all steps, with the caller's in the graph, whose gradient is then zero and not none
        bases = torch.where(torch.zeros_like(bases, dtype=torch.bool), given, bases.detach())
    return bases, coef * (x.mT @ bases) / (coef @ (bases.mT @ bases) + EPS)
