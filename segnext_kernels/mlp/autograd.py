"""Schema and fake of mlp."""

from __future__ import annotations

from .._register import register_inference
from .reference import mlp

register_inference(
    "mlp(Tensor x, Tensor fc1, Tensor bias1, Tensor depthwise, Tensor depthwise_bias, Tensor fc2, Tensor bias2, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor",
    mlp,
)
