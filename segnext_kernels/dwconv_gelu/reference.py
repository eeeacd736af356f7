"""The meaning of dwconv_gelu in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._validate import accumulator


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(3x3 depthwise convolution + bias), the erf form. See the public function."""
    dtype = x.dtype
    x, weight, bias = (t.to(accumulator(dtype)) for t in (x, weight, bias))
    if x.numel() == 0:  # convolutions refuse empty images; the sum keeps the graph to every input
        return (x + (weight.sum() + bias.sum()) * 0).to(dtype)
    return F.gelu(F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])).to(dtype)
