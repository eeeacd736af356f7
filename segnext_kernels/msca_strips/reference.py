"""The meaning of msca_strips in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .._validate import accumulator


def msca_strips(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """a = W5 * x + b5; y = a + sum_k (V_k * (H_k * a + bh_k) + bv_k), depthwise with zero padding. See the public function."""
    dtype, channels = x.dtype, x.shape[1]
    x, w5, b5, *strips = (t.to(accumulator(dtype)) for t in (x, *weights))
    if x.numel() == 0:  # convolutions refuse empty images; the sum keeps the graph to every input
        return (x + sum(w.sum() for w in (w5, b5, *strips)) * 0).to(dtype)
    a = F.conv2d(x, w5, b5, padding=w5.shape[-1] // 2, groups=channels)
    y = a
    for i in range(0, len(strips), 4):
        wh, bh, wv, bv = strips[i : i + 4]
        rows = F.conv2d(a, wh, bh, padding=(0, wh.shape[-1] // 2), groups=channels)
        y = y + F.conv2d(rows, wv, bv, padding=(wv.shape[-2] // 2, 0), groups=channels)
    return y.to(dtype)
