"""mlp in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._pack import unpack
from .._validate import channels_last
from ..dwconv_gelu.reference import dwconv_gelu


def mlp(
    x: Tensor,
    fc1: Tensor,
    bias1: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    fc2: Tensor,
    bias2: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Accumulates in float32."""
    if x.numel() == 0:  # convolutions refuse empty images
        return x.clone()
    hidden, channels = bias1.shape[0], x.shape[1]
    wide = F.conv2d(x.float(), unpack(fc1, hidden, channels)[:, :, None, None], bias1)
    narrow = dwconv_gelu(wide, depthwise, depthwise_bias)
    y = x.float() + F.conv2d(narrow, unpack(fc2, channels, hidden)[:, :, None, None], bias2)
    if norm_weight is not None:
        y = F.layer_norm(y.permute(0, 2, 3, 1), (channels,), norm_weight, norm_bias, eps).permute(0, 3, 1, 2)
    return channels_last(y.to(x.dtype))
