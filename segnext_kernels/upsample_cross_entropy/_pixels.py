"""What forward and backward of upsample_cross_entropy in Triton both compute for a tile of output pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from .._bilinear import resized, rows_at_a_time
from .._triton import config

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials and logarithms have base 2


def tiles(rows: int, height: int) -> list[triton.Config]:
    together = rows_at_a_time(rows, height)
    return [config(4, ROWS=together), config(4, ROWS=max(together // 2, 1)), config(8, ROWS=together)]


LEAST = tl.constexpr(-3e38)


@triton.jit
def in_base_2(z):
    """Of the most negative floats there is no multiple: they stay finite, for differences of two. NaN and infinity stay."""
    scaled = z * LOG2_E
    return tl.where((scaled < LEAST) & (z > float("-inf")), LEAST, scaled)


@triton.jit
def pixel_weight(label, weight, ignored, classes, WEIGHTED: tl.constexpr):
    """Of what is neither a class nor ignored it is nan, and so are the loss and its gradient: a kernel cannot raise."""
    is_class = (label >= 0) & (label < classes)
    of_class = tl.load(weight + label, mask=is_class, other=0.0) if WEIGHTED else 1.0
    return tl.where(label == ignored, 0.0, tl.where(is_class, of_class, float("nan")))


@triton.jit
def log_sum_exp(
    upper_row, lower_row, left, right, across, down, inside, classes, stride_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of the classes' logits at a tile of pixels [ROWS, COLUMNS] in the gap between two rows."""
    most = tl.full([ROWS, COLUMNS], -3e38, tl.float32)  # of -inf the distance to -inf would be nan
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for c in range(classes):
        at = tl.cast(c, tl.int64) * stride_c
        upper = in_base_2(resized(upper_row + at, left, right, across, inside))
        lower = in_base_2(resized(lower_row + at, left, right, across, inside))
        z = upper + down * (lower - upper)
        e = tl.exp2(-tl.abs(z - most))  # what the smaller of them is, where the larger is 1
        total = tl.where(z > most, total * e + 1, total + e)
        most = tl.maximum(most, z)
    return most + tl.log2(total)
