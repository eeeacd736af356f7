"""upsample_cross_entropy in Triton; backward is in triton_backward.py.

A program takes the output pixels between two rows of logits, some columns wide, and resizes these rows horizontally once for
all of them. It holds a running maximum and sum of exponentials for a tile of pixels, class after class, and writes two sums, of
weighted losses and of weights, which one more program adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._bilinear import around_gap, resized, row_weights, source
from .._triton import ceil_div, config, launch, power_of_2, wrap_triton
from ._pixels import LOG2_E, in_base_2, log_sum_exp, pixel_weight, tiles
from .triton_backward import backward  # noqa: F401  is registered with forward


def forward(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    images, classes, rows, columns = logits.shape
    height, width = target.shape[1:]
    if target.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=logits.device)
    wide = min(128, power_of_2(width))
    sums = torch.empty((2, images * rows * ceil_div(width, wide)), dtype=torch.float32, device=logits.device)
    loss = torch.empty((), dtype=torch.float32, device=logits.device)

    def grid(meta):
        return images * rows, ceil_div(width, wide)

    launch(
        wrap_triton(add_losses),
        grid,
        logits,
        target,
        logits if weight is None else weight,
        sums,
        ignore_index,
        classes,
        rows,
        columns,
        height,
        width,
        *logits.stride(),
        configs=tiles(rows, height),
        key=("classes", "rows", "height"),
        WEIGHTED=weight is not None,
        COLUMNS=wide,
    )
    launch(wrap_triton(finish), lambda meta: (1,), sums, loss, sums.shape[1], configs=(config(4, BLOCK=1024),))
    return loss


@triton.jit
def add_losses(
    logits,  # [N, C, h, w]
    target,  # [N, H, W]
    weight,  # [C]
    sums,  # [2, programs]
    ignored,
    classes,
    rows,
    columns,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    image, begin, end, upper_row, lower_row = around_gap(logits, tl.program_id(0), rows, height, stride_n, stride_h)
    down_begin, step = row_weights(tl.program_id(0) % rows, begin, rows, height)
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = x < width
    left, right, across = source(x, columns, width)
    left, right = left * stride_w, right * stride_w
    losses = tl.zeros([ROWS, COLUMNS], tl.float32)
    weights = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        y = first + tl.arange(0, ROWS)[:, None]
        down = tl.maximum(down_begin + (y - begin) * step, 0.0)
        lse = log_sum_exp(upper_row, lower_row, left, right, across, down, inside, classes, stride_c, ROWS, COLUMNS)
        pixels = (y < end) & inside
        label = tl.load(target + (image * height + y) * width + x, mask=pixels, other=ignored)
        counts = pixel_weight(label, weight, ignored, classes, WEIGHTED)
        known = (label >= 0) & (label < classes) & (counts != 0)
        at = tl.where(known, label, 0) * stride_c
        upper = in_base_2(resized(upper_row + at, left, right, across, known))
        lower = in_base_2(resized(lower_row + at, left, right, across, known))
        losses += tl.where(counts != 0, counts * (lse - (upper + down * (lower - upper))), 0.0)
        weights += counts
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(sums + program, tl.sum(losses) / LOG2_E)
    tl.store(sums + programs + program, tl.sum(weights))


@triton.jit
def finish(sums, loss, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    losses = tl.zeros([BLOCK], tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        inside = first + lane < count
        losses += tl.load(sums + first + lane, mask=inside, other=0.0).to(tl.float64)
        weights += tl.load(sums + count + first + lane, mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(weights)
    tl.store(loss, tl.where(total == 0, 0.0, tl.sum(losses) / tl.where(total == 0, 1.0, total)).to(tl.float32))
