"""What users write in plain PyTorch, as the operators' docstrings have it, in the dtype of the inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def msca_strips(x: Tensor, *weights: Tensor) -> Tensor:
    channels = x.shape[1]
    w5, b5, *strips = weights
    a = F.conv2d(x, w5, b5, padding=2, groups=channels)
    y = a
    for wh, bh, wv, bv in zip(strips[0::4], strips[1::4], strips[2::4], strips[3::4], strict=True):
        k = wh.shape[-1]
        rows = F.conv2d(a, wh, bh, padding=(0, k // 2), groups=channels)
        y = y + F.conv2d(rows, wv, bv, padding=(k // 2, 0), groups=channels)
    return y


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.conv2d(x, weight, bias, padding=1, groups=x.shape[1]))


def nmf(x: Tensor, bases: Tensor, steps: int) -> Tensor:
    coef = torch.softmax(x.mT @ bases, dim=-1)
    for _ in range(steps):
        coef = coef * (x.mT @ bases) / (coef @ (bases.mT @ bases) + 1e-6)
        bases = bases * (x @ coef) / (bases @ (coef.mT @ coef) + 1e-6)
    coef = coef * (x.mT @ bases) / (coef @ (bases.mT @ bases) + 1e-6)
    return bases @ coef.mT
