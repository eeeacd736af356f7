"""The meaning of upsample_cross_entropy in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._validate import accumulator


def upsample_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = 255) -> Tensor:
    """The mean cross-entropy of bilinearly upsampled logits. See the public function."""
    logits = logits.to(accumulator(logits.dtype))
    if target.numel() == 0:
        return (logits * 0).nan_to_num(0).sum()
    upsampled = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(upsampled, target, weight, ignore_index=ignore_index, reduction="sum")
    known = target != ignore_index
    if weight is None:
        return total / known.sum().clamp(min=1)
    weights = torch.where(known, weight[torch.where(known, target, 0)], 0).sum()
    return total / torch.where(weights == 0, 1, weights)
