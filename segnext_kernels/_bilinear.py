"""Where the pixels of bilinearly upsampled images come from, for the Triton kernels.

All that is upsampled between the same two rows, here a gap, mixes these: they are resized horizontally once, for the whole gap.
The gap of a row is the one below it; above the first row and below the last there is nothing to mix, which their gaps include.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import ceil_div


def rows_at_a_time(rows: int, height: int) -> int:
    """How many rows of a gap to compute together: few of them idle, and little else to compute for them."""
    gap = ceil_div(height, rows)
    return min((8, 4, 2, 1), key=lambda together: ceil_div(gap, together) * (together + 1))


@triton.jit
def source(index, size, target_size):
    """The two elements that lie around an upsampled one, and the second's weight; without rounding but for the weight's."""
    period = 2 * target_size
    place = tl.maximum((2 * tl.cast(index, tl.int64) + 1) * size - target_size, 0)
    first = place // period
    return first, tl.minimum(first + 1, size - 1), (place - first * period) / period  # a size of 1 is no tensor


@triton.jit
def gap_begin(element, size, target_size):
    """The first upsampled element in the gap of this one, the end of the gap before; ``size`` is the end of the last."""
    index = ((2 * tl.cast(element, tl.int64) + 1) * target_size + size - 1) // (2 * size)
    return tl.where(element > 0, tl.minimum(index, target_size), 0)


@triton.jit
def row_weights(gap, begin, rows, height):
    """The lower row's weight in a gap's first output row, and how much it grows to the next; below 0 it is meant to be 0.

    Kernels that compute the same values twice need the same bits: all do it by this and :func:`resized`.
    """
    weight = ((2 * begin + 1) * rows - height - 2 * tl.cast(gap, tl.int64) * height).to(tl.float32) / (2 * height)
    mixes = gap < rows - 1  # else both rows are the last
    return tl.where(mixes, weight, 0.0), tl.where(mixes, tl.cast(rows, tl.float32) / height, 0.0)


@triton.jit
def nearest(index, size, target_size):
    """The element that an upsampled one is nearest to."""
    return (2 * tl.cast(index, tl.int64) + 1) * size // (2 * target_size)


@triton.jit
def nearest_begin(element, size, target_size):
    """The first upsampled element that is nearest to this one; at most ceil(target_size / size) are."""
    return (2 * tl.cast(element, tl.int64) * target_size + size - 1) // (2 * size)


@triton.jit
def resized(row, left, right, across, inside):
    """A row at upsampled columns, from pointers to the row and the places of the two columns around each."""
    a = tl.load(row + left, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(row + right, mask=inside, other=0.0).to(tl.float32)
    return a + across * (b - a)


@triton.jit
def around_gap(logits, index, rows, height, stride_n, stride_h):
    """Of all images' gaps one: its image, its output rows, pointers to the two rows of logits around it."""
    image = (index // rows).to(tl.int64)
    gap = index % rows
    upper = logits + image * stride_n + tl.cast(gap, tl.int64) * stride_h
    lower = logits + image * stride_n + tl.cast(tl.minimum(gap + 1, rows - 1), tl.int64) * stride_h
    return image, gap_begin(gap, rows, height), gap_begin(gap + 1, rows, height), upper, lower
