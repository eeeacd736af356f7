"""Schema and fake of group_norm_relu."""

from __future__ import annotations

import torch

from .._register import register_inference
from .reference import group_norm_relu


def _fake(x, *args):
    return torch.empty_like(x, memory_format=torch.channels_last)


register_inference(
    "group_norm_relu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? residual) -> Tensor",
    _fake,
    group_norm_relu,
)
