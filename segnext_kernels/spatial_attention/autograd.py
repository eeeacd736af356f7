"""Schema and fake of spatial_attention."""

from __future__ import annotations

import torch

from .._register import register_inference
from .reference import spatial_attention


def _fake(x, *args):
    return torch.empty_like(x, memory_format=torch.channels_last)


register_inference("spatial_attention(Tensor x, Tensor[] weights) -> Tensor", _fake, spatial_attention)
