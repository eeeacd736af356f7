"""group_norm_relu in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._validate import channels_last


def group_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, residual: Tensor | None) -> Tensor:
    """Computes in float32, the deviations from the mean first: F.group_norm loses digits where the mean is large."""
    rows = x.float().unflatten(1, (groups, -1)).flatten(2)
    deviations = rows - rows.mean(-1, keepdim=True)
    variance = deviations.square().mean(-1, keepdim=True)
    z = (deviations / torch.sqrt(variance + eps)).view(x.shape) * weight[:, None, None] + bias[:, None, None]
    z = z if residual is None else z + residual
    return channels_last(F.relu(z).to(x.dtype))
