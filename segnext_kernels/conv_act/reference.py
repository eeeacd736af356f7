"""conv_act in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._pack import unpack
from .._validate import channels_last

ACTIVATIONS = {"none": lambda z: z, "gelu": F.gelu, "relu": F.relu}


def conv_act(x: Tensor, weight: Tensor, bias: Tensor, kernel_size: int, stride: int, activation: str) -> Tensor:
    """Accumulates in float32."""
    outputs, channels = bias.shape[0], x.shape[1]
    if 0 in (outputs, *x.shape[2:]):  # convolutions refuse empty images, and to have no outputs
        return channels_last(x.new_empty(x.shape[0], outputs, *((size - 1) // stride + 1 for size in x.shape[2:])))
    filters = unpack(weight, outputs, channels * kernel_size**2).unflatten(1, (kernel_size, kernel_size, channels))
    z = F.conv2d(x.float(), filters.permute(0, 3, 1, 2), bias, stride, kernel_size // 2)
    return channels_last(ACTIVATIONS[activation](z).to(x.dtype))
