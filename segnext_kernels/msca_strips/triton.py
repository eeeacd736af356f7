"""msca_strips forward in Triton: one pass over x, in which a program marches down some channels and columns.

    x rows  --load-->  scratch rows  --5x5-->  a: 4 incomplete rows wait in registers
    a rows  --store--> scratch rows  --row filters, 21 shifts-->  3 results  --column filters-->  y: 20 rows wait in registers

A step takes ROWS rows of x, completes as many of a and of y, and waits for the program's threads twice. Filters along rows and
along columns commute, so that only single rows pass between threads. What is read twice is the halo of 12 columns between
programs where a row is longer than a program's, and of 12 rows where a plane is cut into strips; see ``traffic``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stencil import Tiles, lanes_of, load_rows, load_taps, scratch_rows, store_rows, warps, zeros
from .._triton import config, is_channels_last, launch, wrap_triton
from ._filters import (
    BRANCHES,
    HALO,
    REACH,
    TAPS,
    column_bias,
    convolve,
    covered,
    filter_columns,
    filter_rows,
    load_shifted,
    most_rows,
    pack,
    row_bias,
    tiles_of,
)
from .triton_backward import backward  # noqa: F401  the operator's other half


def forward(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() > 0:
        last = is_channels_last(x)
        tiles = tiles_of(x.shape, last, most=512)
        launch(
            wrap_triton(strips),
            lambda meta: (tiles.programs,),
            x,
            pack(weights),
            y,
            tiles.scratch(x, rows=most_rows(configs(tiles)), reach=REACH.value),
            *x.shape[1:],
            *x.stride(),
            *tiles.pitches(last, REACH.value),
            tiles.blocks,
            tiles.across,
            tiles.strips,
            tiles.rows,
            configs=configs(tiles),
            key=("channels", "height", "width", "LAST"),
            LAST=last,
            CHANNELS=tiles.channels,
            COLUMNS=tiles.columns,
            HALO=tiles.halo,
        )
    return y


def configs(tiles: Tiles) -> list[triton.Config]:
    # With two lanes a thread needs all of 255 registers, none for rows ahead, and cannot have more than 128 among 512 threads.
    choices = ((1, 2), (1, 4)) if tiles.lanes <= 256 else ((2, 1),)
    return [config(warps(tiles.lanes, each), ROWS=rows, AHEAD=each == 1) for each, rows in choices]


def traffic(shape: Sequence[int], channels_last: bool) -> float:
    """What the programs read of x and write of y, over reading and writing everything once.

    Where programs have fewer channels than a sector of memory, they share it with their neighbours through the cache.
    """
    tiles = tiles_of(shape, channels_last, most=512)
    _, _, height, width = shape
    columns = covered(width, tiles.across, tiles.columns - 2 * tiles.halo, tiles.halo)
    return (columns * covered(height, tiles.strips, tiles.rows, HALO) / (height * width) + 1) / 2


# Strides that were known to be one would make the compiler give each thread neighbours along memory: several channels' taps.
@triton.jit(do_not_specialize=["stride_c", "stride_w", "pitch_c", "pitch_w"])
def strips(
    x,  # [N, C, H, W]
    filters,  # [TAPS, C]
    y,  # like x
    scratch,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    pitch_c,
    pitch_w,
    blocks,
    across,
    parts,
    rows,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALO: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    own_channel, lane, channel, column, inside, own, offset, first, end = lanes_of(
        blocks, across, parts, rows, channels, height, width, stride_n, stride_c, stride_w, LAST, CHANNELS, COLUMNS, HALO
    )
    taps = load_taps(filters + channel, channels, channel < channels, TAPS)
    total_bias = taps[column_bias(0)]
    for branch in tl.static_range(1, BRANCHES):
        total_bias += taps[column_bias(branch)]

    STEP: tl.constexpr = CHANNELS if LAST else 1  # from a column to the next in the scratch rows
    ROW: tl.constexpr = CHANNELS * (COLUMNS + 2 * REACH)
    xs = scratch_rows(scratch, own_channel, lane, pitch_c, pitch_w, 2 * ROWS, COLUMNS, REACH, ROW, STEP)
    a_rows = xs + ROWS * ROW

    start = tl.maximum(first - (REACH + 2), 0)
    last = tl.minimum(end + (REACH + 2), height)  # rows that are needed, as far as the image has them
    below = tl.minimum(end + REACH, height) + 2
    stem = zeros(offset.to(tl.float32), 4)
    sums = zeros(stem[0], 2 * REACH)
    if AHEAD:
        rows_of_x = load_rows(x + offset, start, last, stride_h, inside, ROWS)
    for row in range(start, below, ROWS):
        if not AHEAD:
            rows_of_x = load_rows(x + offset, row, last, stride_h, inside, ROWS)
        store_rows(xs, rows_of_x, ROWS, ROW)
        tl.debug_barrier()
        if AHEAD:
            rows_of_x = load_rows(x + offset, row + ROWS, last, stride_h, inside, ROWS)
        stem = convolve(stem, load_shifted(xs, ROWS, STEP, ROW), taps, ROWS, 1)
        a = ()
        for i in tl.static_range(ROWS):
            there = inside & (row + (i - 2) >= 0) & (row + (i - 2) < height)
            a = a + (tl.where(there, stem[i] + taps[25], 0.0),)
        store_rows(a_rows, a, ROWS, ROW)
        stem = stem[ROWS:]
        tl.debug_barrier()
        filtered = filter_rows(a_rows, taps, ROWS, STEP, ROW, 1)
        results = ()
        for branch in tl.static_range(BRANCHES):
            for i in tl.static_range(ROWS):
                there = (row + (i - 2) >= 0) & (row + (i - 2) < height)
                results = results + (tl.where(there, filtered[branch * ROWS + i] + taps[row_bias(branch)], 0.0),)
        sums = filter_columns(sums, results, a, taps, ROWS, 1)
        for i in tl.static_range(ROWS):
            done = row + (i - (REACH + 2))
            tl.store(y + offset + done * stride_h, sums[i] + total_bias, mask=own & (done >= first) & (done < end))
        sums = sums[ROWS:]
    done = start + (below - start + ROWS - 1) // ROWS * ROWS - (REACH + 2)
    for i in tl.static_range(2 * REACH):  # what no further row of a reaches
        there = own & (done + i >= first) & (done + i < end)
        tl.store(y + offset + (done + i) * stride_h, sums[i] + total_bias, mask=there)
