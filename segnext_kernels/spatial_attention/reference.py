"""spatial_attention in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .._pack import unpack
from .._validate import channels_last
from ..msca_strips.reference import msca_strips


def spatial_attention(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Accumulates in float32."""
    if x.numel() == 0:  # convolutions refuse empty images
        return x.clone()
    proj_1, bias_1, *strips, conv3, bias_3, proj_2, bias_2, scale = (weight.float() for weight in weights)

    def project(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(z, unpack(weight, x.shape[1], x.shape[1])[:, :, None, None], bias)

    u = F.gelu(project(x.float(), proj_1, bias_1))
    gated = project(msca_strips(u, strips), conv3, bias_3) * u
    y = scale[:, None, None] * x.float() + project(gated, proj_2, bias_2)
    return channels_last(y.to(x.dtype))
