"""Where windows lie in a picture that is looked at, or cut, part by part."""

from __future__ import annotations

import math


def windows(size: int, window: int, stride: int) -> list[slice]:
    """Where windows lie along a side: ``stride`` apart, the last one moved back to end where the side ends."""
    count = math.ceil(max(size - window, 0) / stride) + 1
    starts = (min(i * stride, max(size - window, 0)) for i in range(count))
    return [slice(start, min(start + window, size)) for start in starts]
