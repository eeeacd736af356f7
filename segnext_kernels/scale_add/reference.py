"""The meaning of scale_add in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._validate import accumulator


def scale_add(x: Tensor, y: Tensor, scale: Tensor, keep: Tensor | None = None) -> Tensor:
    """x + keep * scale * y. See the public function."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), scale.dtype)
    x, y, scale = (t.to(accumulator(dtype)) for t in (x, y, scale))
    scaled = scale[:, None, None] * y
    if keep is not None:
        scaled = keep.to(scaled.dtype)[:, None, None, None] * scaled
    return (x + scaled).to(dtype)
