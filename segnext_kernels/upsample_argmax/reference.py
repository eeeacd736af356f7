"""The meaning of upsample_argmax in plain PyTorch, some rows of the label map at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._validate import accumulator

STRIP_ELEMENTS = 1 << 24  # upsampled logits held at a time: 64 MB in float32


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The argmax of bilinearly upsampled logits. See the public function."""
    logits = logits.to(accumulator(logits.dtype))
    batch, classes, height, _ = logits.shape
    if 0 in (batch, *size):
        return torch.empty(batch, *size, device=logits.device, dtype=torch.int64)
    rows = max(1, STRIP_ELEMENTS // (batch * classes * size[1]))
    y = (torch.arange(size[0], device=logits.device, dtype=logits.dtype) + 0.5) * (height / size[0]) - 0.5
    y = y.clamp(0, height - 1)
    above = y.long()
    below, weight = (above + 1).clamp(max=height - 1), (y - above)[:, None]
    labels = []
    for start in range(0, size[0], rows):
        strip = slice(start, start + rows)
        upper, w = logits[:, :, above[strip]], weight[strip]
        tall = torch.where(w == 0, upper, upper * (1 - w) + logits[:, :, below[strip]] * w)  # lerp makes NaN of two infinities
        labels.append(F.interpolate(tall, (tall.shape[2], size[1]), mode="bilinear", align_corners=False).argmax(1))
    return torch.cat(labels, 1)
