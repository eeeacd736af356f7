"""hamburger in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._pack import unpack
from ..group_norm_relu.reference import group_norm_relu
from ..nmf.reference import factorise


def hamburger(
    x: Tensor,
    ham_in: Tensor,
    bias: Tensor,
    bases: Tensor,
    steps: int,
    ham_out: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: int,
    eps: float,
    round_factors: bool,
) -> Tensor:
    """Computes in float32; the second convolution is one of the bases, as in the kernel."""
    if x.numel() == 0:  # convolutions refuse empty images
        return x.clone()
    channels = x.shape[1]
    v = F.relu(F.conv2d(x.float(), unpack(ham_in, channels, channels)[:, :, None, None], bias))
    bases, coef = factorise(v.flatten(2), bases, steps)
    z = (torch.matmul(ham_out, bases) @ coef.mT).view(x.shape)
    return group_norm_relu(z, norm_weight, norm_bias, groups, eps, x.float()).to(x.dtype)
