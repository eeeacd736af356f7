"""upsample_argmax in Triton: a program finds the labels of some pixels, class after class."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .._bilinear import source
from .._triton import config, launch

CONFIGS = (config(4, BLOCK=256), config(4, BLOCK=128), config(8, BLOCK=512))


def forward(logits: Tensor, height: int, width: int) -> Tensor:
    labels = torch.empty((logits.shape[0], height, width), dtype=torch.int64, device=logits.device)
    if labels.numel() > 0:

        def grid(meta):
            return triton.cdiv(height * width, meta["BLOCK"]), logits.shape[0]

        launch(
            wrap_triton(highest),
            grid,
            logits,
            labels,
            *logits.shape[1:],
            height,
            width,
            *logits.stride(),
            configs=CONFIGS,
            key=("classes",),
        )
    return labels


@triton.jit
def highest(
    logits,  # [N, C, h, w]
    labels,  # [N, H, W]
    classes,
    rows,
    columns,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    above, below, down = source(pixel // width, rows, height)
    left, right, across = source(pixel % width, columns, width)
    image = tl.program_id(1).to(tl.int64)
    z = logits + image * stride_n
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK], tl.int64)
    for c in range(classes):
        top = z + above * stride_h
        bottom = z + below * stride_h
        a = tl.load(top + left * stride_w, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(top + right * stride_w, mask=inside, other=0.0).to(tl.float32)
        upper = a + across * (b - a)
        a = tl.load(bottom + left * stride_w, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(bottom + right * stride_w, mask=inside, other=0.0).to(tl.float32)
        lower = a + across * (b - a)
        value = upper + down * (lower - upper)
        label = tl.where(value > best, c, label)
        best = tl.maximum(best, value)
        z += stride_c
    tl.store(labels + image * height * width + pixel, label, mask=inside)
