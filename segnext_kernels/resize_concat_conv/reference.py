"""resize_concat_conv in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._pack import unpack
from .._validate import channels_last


def resize_concat_conv(maps: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Accumulates in float32."""
    size = maps[0].shape[2:]
    if bias.shape[0] == 0:  # convolutions refuse to have no outputs
        return channels_last(maps[0].new_empty(maps[0].shape[0], 0, *size))
    resized = [F.interpolate(x.float(), size, mode="bilinear", align_corners=False) for x in maps]
    filters = [unpack(w, bias.shape[0], x.shape[1]) for w, x in zip(weights, maps, strict=True)]
    y = F.conv2d(torch.cat(resized, dim=1), torch.cat(filters, dim=1)[:, :, None, None], bias)
    return channels_last(y.to(maps[0].dtype))
