"""Schema and fake of spatial_attention."""

from __future__ import annotations

from .._register import register_inference
from .reference import spatial_attention

register_inference("spatial_attention(Tensor x, Tensor[] weights) -> Tensor", spatial_attention)
