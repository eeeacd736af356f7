"""Schema and fake of group_norm_relu."""

from __future__ import annotations

from .._register import register_inference
from .reference import group_norm_relu

register_inference(
    "group_norm_relu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? residual) -> Tensor",
    group_norm_relu,
)
