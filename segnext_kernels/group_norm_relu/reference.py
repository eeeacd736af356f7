"""group_norm_relu in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, residual: Tensor | None) -> Tensor:
    """Computes in float32."""
    z = F.group_norm(x.float(), groups, weight, bias, eps)
    z = z if residual is None else z + residual
    return F.relu(z).to(x.dtype).contiguous(memory_format=torch.channels_last)
