"""upsample_argmax in Triton: a program finds the labels between two rows of logits, some columns wide, class after class.

It resizes the two rows horizontally once for all output rows between them and holds the highest value and its class for a tile
of output pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._bilinear import around_gap, resized, row_weights, rows_at_a_time, source
from .._triton import ceil_div, config, launch, wrap_triton


def forward(logits: Tensor, height: int, width: int) -> Tensor:
    images, classes, rows, columns = logits.shape
    labels = torch.empty((images, height, width), dtype=torch.int64, device=logits.device)
    if labels.numel() > 0:

        def grid(meta):
            return images * rows, ceil_div(width, meta["COLUMNS"])

        together = rows_at_a_time(rows, height)
        launch(
            wrap_triton(highest),
            grid,
            logits,
            labels,
            classes,
            rows,
            columns,
            height,
            width,
            *logits.stride(),
            configs=[
                config(4, ROWS=together, COLUMNS=128),
                config(2, ROWS=together, COLUMNS=64),
                config(4, ROWS=4, COLUMNS=128),
            ],
            key=("classes",),  # pictures that are evaluated have any size
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image, begin, end, upper_row, lower_row = around_gap(logits, tl.program_id(0), rows, height, stride_n, stride_h)
    weight, step = row_weights(tl.program_id(0) % rows, begin, rows, height)
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = x < width
    left, right, across = source(x, columns, width)
    left, right = left * stride_w, right * stride_w
    for first in range(begin, end, ROWS):
        y = first + tl.arange(0, ROWS)[:, None]
        down = tl.maximum(weight + (y - begin) * step, 0.0)
        best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        label = tl.zeros([ROWS, COLUMNS], tl.int32)
        for c in range(classes):
            at = tl.cast(c, tl.int64) * stride_c
            upper = resized(upper_row + at, left, right, across, inside)
            lower = resized(lower_row + at, left, right, across, inside)
            value = upper + down * (lower - upper)
            label = tl.where(value > best, c, label)
            best = tl.maximum(best, value)
        to = labels + (image * height + y) * width + x
        tl.store(to, label.to(tl.int64), mask=(y < end) & inside)
