"""The gradient of upsample_cross_entropy in Triton, without atomics.

The log-sum-exp of every pixel is computed again; then a program computes the gradient of some rows of some classes in one walk
down the logits. Its lanes are [classes, columns]; a lane holds the logits of its column, of the one to its left and of the one
to its right in the two rows around a gap, and goes through the output pixels in the gap that are nearest to its column: as many
for every lane, each exponential computed once. What they give to the two columns beside goes to the neighbouring lanes when a
row is complete; what they give to the lower row is carried on to the next gap.

The log-sum-exps are ordered so that a program's lanes read them side by side, and kept for one strip of the logits' rows at a
time: beside the gradient, backward allocates no more than the logits themselves take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._bilinear import around_gap, gap_begin, nearest, nearest_begin, row_weights, source
from .._triton import ceil_div, config, launch, power_of_2, wrap_triton
from ._pixels import in_base_2, log_sum_exp, pixel_weight, tiles
from ._strips import LANES, WEIGHT_SUMS, strips

WEIGHT_BLOCK = 1024


def backward(grad_out: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    if target.numel() == 0:
        return torch.zeros_like(logits)
    images, classes, rows, columns = logits.shape
    height, width = target.shape[1:]
    grad = torch.empty_like(logits)
    plan = strips(logits.shape, target.shape[1:], logits.element_size())
    weight_sums = min(ceil_div(target.numel(), WEIGHT_BLOCK), WEIGHT_SUMS)
    weights = torch.empty(WEIGHT_SUMS, dtype=torch.float32, device=logits.device)
    lse = torch.empty(plan.places, dtype=torch.float32, device=logits.device)
    labels = torch.empty(plan.places, dtype=plan.label, device=logits.device)
    class_weight, weighted = logits if weight is None else weight, weight is not None
    sizes = classes, rows, columns, height, width, *logits.stride()
    launch(
        wrap_triton(add_weights),
        lambda meta: (weight_sums,),
        target,
        class_weight,
        weights,
        target.numel(),
        ignore_index,
        classes,
        configs=(config(4, BLOCK=WEIGHT_BLOCK),),
        WEIGHTED=weighted,
    )
    lanes = min((64, 32), key=lambda lanes: lanes * blocks(columns, lanes)) if columns > 32 else power_of_2(columns, 4)
    wide = min(LANES // lanes, power_of_2(classes))
    warps = {64: (2, 4), 32: (8, 4)}.get(lanes, (4, 2))  # as an H100 told; 2 with 64 lanes and 16 classes would spill
    configs = [config(count, CLASSES=wide) for count in warps]
    for strip in range(int(ceil_div(images * plan.segments, plan.together))):  # what is traced holds for as many
        first = strip * plan.together
        last = min(first + plan.together, images * plan.segments) - 1
        # The gaps, counted through all images, from the one above the strip's first row to the one below its last
        first_gap = first // plan.segments * rows + torch.sym_max(first % plan.segments * plan.segment - 1, 0)
        end_gap = last // plan.segments * rows + torch.sym_min((last % plan.segments + 1) * plan.segment, rows)

        def gaps(meta, count=end_gap - first_gap):
            return count, ceil_div(width, meta["COLUMNS"])

        def walks(meta, count=last + 1 - first):
            return count * ceil_div(classes, meta["CLASSES"]), blocks(columns, lanes)

        launch(
            wrap_triton(keep_log_sum_exps),
            gaps,
            logits,
            target,
            lse,
            labels,
            first_gap,
            ignore_index,
            *sizes,
            configs=[config(c.num_warps, COLUMNS=32 * c.num_warps, **c.kwargs) for c in tiles(rows, height)],
            key=("classes", "rows", "height"),
        )
        launch(
            wrap_triton(gather),
            walks,
            logits,
            grad,
            lse,
            labels,
            class_weight,
            weights,
            grad_out,
            weight_sums,
            first_gap,
            first,
            plan.segment,
            plan.segments,
            *sizes,
            configs=configs,
            key=("classes", "rows", "columns", "height", "width"),
            WEIGHTED=weighted,
            SUMS=WEIGHT_SUMS,
            LANES=lanes,
        )
    return grad


def blocks(columns: int, lanes: int) -> int:
    """How many programs compute the gradient of a row; each begins with the last two columns of the one before."""
    return 1 + ceil_div(max(columns - lanes, 0), lanes - 2)


@triton.jit
def add_weights(target, weight, sums, pixels, ignored, classes, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, pixels, tl.num_programs(0) * BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        label = tl.load(target + pixel, mask=pixel < pixels, other=ignored)
        total += pixel_weight(label, weight, ignored, classes, WEIGHTED)
    tl.store(sums + tl.program_id(0), tl.sum(total).to(tl.float32))


# Strips of an image differ in these alone: one kernel serves all.
@triton.jit(do_not_specialize=["first_gap"])
def keep_log_sum_exps(
    logits,  # [N, C, h, w]
    target,  # [N, H, W]
    lse,  # [output rows from first_gap on, places of a column, w]
    labels,  # as lse
    first_gap,  # of all images' gaps, here the first program's
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
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    gap = first_gap + tl.program_id(0)
    image, begin, end, upper_row, lower_row = around_gap(logits, gap, rows, height, stride_n, stride_h)
    down_begin, step = row_weights(gap % rows, begin, rows, height)
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = x < width
    left, right, across = source(x, columns, width)
    left, right = left * stride_w, right * stride_w
    column = nearest(x, columns, width)
    place = (x - nearest_begin(column, columns, width)) * columns + column
    places = tl.cdiv(width, columns) * columns
    first_row = image * height - buffered_from(first_gap, rows, height)
    for first in range(begin, end, ROWS):
        y = first + tl.arange(0, ROWS)[:, None]
        down = tl.maximum(down_begin + (y - begin) * step, 0.0)
        found = log_sum_exp(upper_row, lower_row, left, right, across, down, inside, classes, stride_c, ROWS, COLUMNS)
        pixels = (y < end) & inside
        label = tl.load(target + (image * height + y) * width + x, mask=pixels, other=ignored)
        known = (label >= 0) & (label < classes) & (label != ignored)
        to = (first_row + y) * places + place
        tl.store(lse + to, tl.where(known, found, float("inf")), mask=pixels)  # of no class any probability, then
        tl.store(labels + to, tl.where(known, label, -1).to(labels.dtype.element_ty), mask=pixels)


@triton.jit
def buffered_from(first_gap, rows, height):
    """The row, of all images' output rows, that the buffers of log-sum-exps and labels begin with."""
    first_gap = tl.cast(first_gap, tl.int64)
    return first_gap // rows * height + gap_begin(first_gap % rows, rows, height)


@triton.jit
def with_neighbours(row, before, after, inside):
    """The logits in the columns left of the lanes', in these, and right of them, in float32."""
    middle = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    return tl.gather(middle, before, 1), middle, tl.gather(middle, after, 1)


@triton.jit(do_not_specialize=["first_gap", "first_segment"])
def gather(
    logits,  # [N, C, h, w]
    grad,  # as logits
    lse,  # [output rows from first_gap on, places of a column, w]
    labels,  # as lse
    weight,  # [C]
    weights,  # [SUMS], weight_sums of them written
    grad_out,
    weight_sums,
    first_gap,
    first_segment,  # of all images' segments, here the first program's
    segment,  # rows
    segments,  # in an image
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
    SUMS: tl.constexpr,
    LANES: tl.constexpr,
    CLASSES: tl.constexpr,
):
    class_blocks = tl.cdiv(classes, CLASSES)  # programs that read the same log-sum-exps run side by side
    c = tl.program_id(0) % class_blocks * CLASSES + tl.arange(0, CLASSES)[:, None]
    walk = first_segment + tl.program_id(0) // class_blocks
    image = (walk // segments).to(tl.int64)
    start = walk % segments * segment
    stop = tl.minimum(start + segment, rows)

    lane = tl.arange(0, LANES)[None, :]
    j = tl.program_id(1) * (LANES - 2) + lane
    inside = (c < classes) & (j < columns)
    before = tl.broadcast_to(tl.maximum(lane - 1, 0), [CLASSES, LANES])
    after = tl.broadcast_to(tl.minimum(lane + 1, LANES - 1), [CLASSES, LANES])
    complete = inside & ((lane > 0) | (j == 0)) & ((lane < LANES - 1) | (j == columns - 1))

    place = image * stride_n + c.to(tl.int64) * stride_c + j.to(tl.int64) * stride_w

    begin = nearest_begin(j, columns, width)
    count = tl.where(j < columns, nearest_begin(j + 1, columns, width) - begin, 0)  # of the lane's pixels in a row
    offset = ((2 * begin + 1) * columns - width - 2 * j.to(tl.int64) * width).to(tl.int32)  # of the first, in 1 / (2 width)
    places = tl.cdiv(width, columns)
    first_row = image * height - buffered_from(first_gap, rows, height)

    index = tl.arange(0, SUMS)
    total = tl.sum(tl.load(weights + index, mask=index < weight_sums, other=0.0).to(tl.float64))
    scale = tl.where(total == 0, 0.0, tl.load(grad_out).to(tl.float64) / tl.where(total == 0, 1.0, total)).to(tl.float32)

    # Of the upper row around the gap: what the pixels nearest to a lane's column give, and how much of it to the columns beside
    upper_sum = tl.zeros([CLASSES, LANES], tl.float32)
    upper_to_left = tl.zeros([CLASSES, LANES], tl.float32)
    upper_to_right = tl.zeros([CLASSES, LANES], tl.float32)
    first_gap_above = tl.maximum(start - 1, 0)
    row = logits + place + first_gap_above.to(tl.int64) * stride_h
    upper_left, upper, upper_right = with_neighbours(row, before, after, inside)
    for gap in range(first_gap_above, stop):
        row = logits + place + tl.cast(tl.minimum(gap + 1, rows - 1), tl.int64) * stride_h
        lower_left, lower, lower_right = with_neighbours(row, before, after, inside)
        lower_sum = tl.zeros([CLASSES, LANES], tl.float32)
        lower_to_left = tl.zeros([CLASSES, LANES], tl.float32)
        lower_to_right = tl.zeros([CLASSES, LANES], tl.float32)
        y_begin, y_end = gap_begin(gap, rows, height), gap_begin(gap + 1, rows, height)
        down_begin, step = row_weights(gap, y_begin, rows, height)
        for k in range(places):
            from_middle = offset + 2 * columns * k
            mixes_left = (from_middle < 0) & (j > 0)
            mixes_right = (from_middle >= 0) & (j < columns - 1)
            numerator = tl.where(mixes_left, from_middle + 2 * width, tl.maximum(from_middle, 0))
            across = numerator.to(tl.float32) / (2 * width)
            first, second = tl.where(mixes_left, upper_left, upper), tl.where(mixes_right, upper_right, upper)
            top = in_base_2(first + across * (second - first))
            first, second = tl.where(mixes_left, lower_left, lower), tl.where(mixes_right, lower_right, lower)
            slope = in_base_2(first + across * (second - first)) - top
            given = tl.zeros([CLASSES, LANES], tl.float32)
            given_down = tl.zeros([CLASSES, LANES], tl.float32)
            at = (first_row + y_begin) * (places * columns) + k * columns + j
            for y in range((y_end - y_begin).to(tl.int32)):
                pixel_lse = tl.load(lse + at, mask=k < count, other=float("inf"))
                label = tl.load(labels + at, mask=k < count, other=-1).to(tl.int32)
                down = tl.maximum(down_begin + y * step, 0.0)
                z = top + down * slope
                above = z - pixel_lse  # at most 0, but for rounding; nan stays, which a minimum would hide
                share = tl.exp2(tl.where(above > 0.0, 0.0, above)) - tl.where(label == c, 1.0, 0.0)
                share = tl.where(k < count, share, 0.0)  # beyond the lane's pixels it may be nan
                if WEIGHTED:
                    share *= tl.load(weight + label, mask=label >= 0, other=0.0)
                given += share
                given_down += down * share
                at += places * columns
            to_left, to_right = tl.where(mixes_left, 1 - across, 0.0), tl.where(mixes_right, across, 0.0)
            given -= given_down
            upper_sum += given
            upper_to_left += to_left * given
            upper_to_right += to_right * given
            lower_sum += given_down
            lower_to_left += to_left * given_down
            lower_to_right += to_right * given_down
        if gap >= start:
            row_sum = upper_sum - upper_to_left - upper_to_right
            row_sum += tl.where(lane < LANES - 1, tl.gather(upper_to_left, after, 1), 0.0)
            row_sum += tl.where(lane > 0, tl.gather(upper_to_right, before, 1), 0.0)
            to = grad + place + tl.cast(gap, tl.int64) * stride_h
            tl.store(to, (scale * row_sum).to(grad.dtype.element_ty), mask=complete)
        upper_left, upper, upper_right = lower_left, lower, lower_right
        upper_sum, upper_to_left, upper_to_right = lower_sum, lower_to_left, lower_to_right
