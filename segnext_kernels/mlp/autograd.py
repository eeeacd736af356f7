"""Schema and fake of mlp."""

from __future__ import annotations

import torch

from .._register import register_inference
from .reference import mlp


def _fake(x, *args):
    return torch.empty_like(x, memory_format=torch.channels_last)


register_inference(
    "mlp(Tensor x, Tensor fc1, Tensor bias1, Tensor depthwise, Tensor depthwise_bias, Tensor fc2, Tensor bias2, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor",
    _fake,
    mlp,
)
