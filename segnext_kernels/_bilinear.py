"""Where the pixels of bilinearly upsampled images come from, for the Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def source(index, size, target_size):
    """The two elements that lie around an upsampled one, and the second's weight; without rounding but for the weight's."""
    period = 2 * target_size.to(tl.int64)
    place = tl.maximum((2 * index.to(tl.int64) + 1) * size - target_size, 0)
    first = place // period
    weight = (place - first * period).to(tl.float32) / period.to(tl.float32)
    return first, tl.minimum(first + 1, size - 1), weight
