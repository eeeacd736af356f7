"""The meaning of upsample_argmax in plain PyTorch, some rows of the label map at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._validate import accumulator

STRIP_ELEMENTS = 1 << 24  # upsampled logits held at a time: 64 MB in float32


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The argmax of bilinearly upsampled logits. See the public function."""
    logits = logits.to(accumulator(logits.dtype))
    batch, classes, height, width = logits.shape
    if 0 in (batch, *size):
        return torch.empty(batch, *size, device=logits.device, dtype=torch.int64)
    together = max(1, STRIP_ELEMENTS // (batch * classes * size[1]))
    rows, columns = _sources(height, size[0], logits), _sources(width, size[1], logits)
    labels = []
    for start in range(0, size[0], together):
        tall = _mixed(logits, 2, *(one[start : start + together] for one in rows))
        labels.append(_mixed(tall, 3, *columns).argmax(1))
    return torch.cat(labels, 1)


def _sources(count: int, wanted: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two rows or columns that each one wanted lies between, and the weight of the second."""
    at = (torch.arange(wanted, device=like.device, dtype=like.dtype) + 0.5) * (count / wanted) - 0.5
    at = at.clamp(0, count - 1)
    first = at.long()
    return first, (first + 1).clamp(max=count - 1), at - first


def _mixed(x: Tensor, dim: int, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Infinities stay: a difference of two, as in lerp, and their products with 0, as in interpolate, would be NaN."""
    weight = weight[:, None] if dim == 2 else weight
    near = x.index_select(dim, first)
    return torch.where(weight == 0, near, near * (1 - weight) + x.index_select(dim, second) * weight)
