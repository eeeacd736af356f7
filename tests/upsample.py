"""Samples for the operators on bilinearly upsampled logits, and what these are in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from operators import HALVES, arrange, error, generator
from torch import Tensor

from segnext_kernels import upsample_argmax, upsample_cross_entropy

IGNORED = 255
# Logits [N, C, h, w] and the size they are resized to: one pixel, odd, larger, smaller, the same, one row, one column, many
# classes, more rows than an item has.
CASES = [((1, 1, 1, 1), (1, 1)), ((2, 3, 1, 1), (5, 7)), ((1, 19, 3, 5), (24, 40)), ((2, 17, 9, 8), (37, 101))]
CASES += [((1, 33, 13, 21), (7, 5)), ((3, 2, 6, 6), (6, 6)), ((1, 5, 1, 40), (8, 40)), ((1, 150, 5, 1), (40, 3))]
CASES += [((1, 300, 2, 2), (5, 5)), ((2, 16, 11, 4), (88, 32)), ((1, 4, 40, 3), (9, 50)), ((2, 7, 5, 3), (1, 64))]
EMPTY = [((0, 3, 4, 4), (8, 8)), ((2, 3, 4, 4), (0, 8)), ((2, 3, 4, 4), (8, 0)), ((2, 3, 0, 4), (0, 8))]


def draw_logits(shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    drawn = 4 * torch.randn(shape, generator=generator(), dtype=torch.float64)
    return arrange(drawn.to(dtype), layout)


def draw_target(shape: Sequence[int], size: Sequence[int], ignored: int = IGNORED) -> Tensor:
    """Classes, a fifth of them ignored."""
    target = torch.randint(0, shape[1], (shape[0], *size), generator=generator())
    return target.masked_fill(torch.rand(target.shape, generator=generator()) < 0.2, ignored)


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits.double(), size, mode="bilinear", align_corners=False)


def check_labels(logits: Tensor, size: Sequence[int], backend: str | None = None) -> Tensor:
    """The logit of every found class is the highest but for rounding; returns the labels."""
    labels = upsample_argmax(logits, size, backend=backend)
    assert labels.dtype == torch.int64 and labels.shape == (logits.shape[0], *size) and labels.is_contiguous()
    if labels.numel():
        exact = upsampled(logits, size)
        shortfall = exact.amax(1) - exact.gather(1, labels[:, None])[:, 0]
        assert shortfall.max() <= (1e-13 if logits.dtype == torch.float64 else 4e-6) * exact.abs().max()
    return labels


def loss_and_gradient(logits: Tensor, target: Tensor, *args, backend: str | None = None) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = upsample_cross_entropy(logits, target, *args, backend=backend)
    (2.5 * loss).backward()
    return loss.detach(), logits.grad


def exact_loss_and_gradient(logits: Tensor, target: Tensor, ignored: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Written out, pixel by pixel, in float64."""
    leaf = logits.detach().double().contiguous().requires_grad_()
    known = target != ignored
    if not known.any():
        return torch.zeros((), dtype=torch.float64), torch.zeros_like(leaf)
    z = upsampled(leaf, target.shape[1:]).movedim(1, -1)[known]
    weights = torch.ones_like(z[0]) if weight is None else weight.double()
    picked = target[known]
    losses = torch.logsumexp(z, -1) - z.gather(-1, picked[:, None])[:, 0]
    loss = (weights[picked] * losses).sum() / weights[picked].sum()
    (2.5 * loss).backward()
    return loss.detach(), leaf.grad


def check_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None, backend: str | None = None) -> None:
    """The loss and its gradient against float64; what is stored in 16 bits is also rounded once."""
    loss, grad = loss_and_gradient(logits, target, IGNORED, weight, backend=backend)
    want_loss, want_grad = exact_loss_and_gradient(logits, target, IGNORED, weight)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32) and loss.shape == ()
    assert grad.dtype == logits.dtype and (backend == "reference" or grad.stride() == logits.stride())
    tolerance = 1e-13 if logits.dtype == torch.float64 else 4e-6
    assert error(loss, want_loss) <= tolerance
    rounding = torch.finfo(logits.dtype).eps / 2 if logits.dtype in HALVES else 0
    floor = 2.5 / max(int((target != IGNORED).sum()), 1)  # a pixel's share: where p is 1 its gradient cancels to nothing
    assert error(grad, want_grad, floor) <= tolerance + rounding
