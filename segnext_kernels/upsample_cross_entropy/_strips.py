"""How the gradient of upsample_cross_entropy in Triton is divided into launches with buffers no larger than the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._triton import ceil_div

WEIGHT_SUMS = 256  # programs that add up the pixels' weights, at most
BUSY = 1024  # programs that keep a GPU busy
LANES = 512  # of a program that computes gradients


class Strips(NamedTuple):
    """How backward divides the logits' rows: a program walks down a segment of one image."""

    segment: int  # rows
    segments: int  # in an image
    together: int  # segments in a strip, which takes two launches
    places: int  # for the log-sum-exps and labels of a strip's pixels
    label: torch.dtype

    @property
    def bytes(self) -> int:
        """What backward allocates beside the gradient."""
        return self.places * (4 + self.label.itemsize) + WEIGHT_SUMS * 4


def strips(shape: Sequence[int], size: Sequence[int], itemsize: int) -> Strips:
    """The largest strips with no larger buffers than these logits, resized to this size.

    A strip is at least a row: where the pixels around one row take more than all the logits, as they can with a few classes in
    a single small image, so does backward.
    """
    images, classes, rows, columns = shape
    height, width = size
    label = torch.int16 if classes < 1 << 15 else torch.int32
    places = ceil_div(width, columns) * columns  # in an output row: as many for every column
    room = max(images * classes * rows * columns * itemsize - WEIGHT_SUMS * 4, 0) // ((4 + label.itemsize) * places)

    def most(gaps: int) -> int:  # output rows in as many gaps, wherever these begin
        return min(ceil_div((2 * gaps + 1) * height, 2 * rows) + 1, images * height)

    segment = 8
    while segment > 2 and images * ceil_div(rows, segment) * ceil_div(classes * columns, LANES) < BUSY:
        segment //= 2  # every segment also computes the gap above it
    while segment > 1 and most(segment + 1) > room:
        segment //= 2
    segments = ceil_div(rows, segment)
    together = images * segments
    if most(together * segment + 1) > room:
        together = max(((2 * rows * (room - 1) // height - 1) // 2 - 1) // segment, 1)
    return Strips(segment, segments, together, most(together * segment + 1) * places, label)
