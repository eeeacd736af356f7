"""dwconv_gelu in Triton: a program marches down some channels and columns, and reads every row of x once.

Forward reads a row of x at three places, which is one read of memory, and adds it to the three rows of outputs it reaches.
Backward does the same to have z again, and with it a row of the gradient of z, which goes through a scratch row to reach its
neighbours: it is added to three rows of the gradient of x, and multiplied with three rows of x for that of the filter. So x,
grad_out and the gradient of x move once, but for the halo of the programs: of rows 2 forward and 4 backward, of columns 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._register import gradient_of, like_layout
from .._stencil import REDUCE, Tiles, add_up, cut, lanes_of, push, scratch_rows, store_sum, store_sums, warps, zeros
from .._triton import ceil_div, config, is_channels_last, launch, power_of_2, wrap_triton


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() > 0:
        last = is_channels_last(x)
        tiles = cut(x.shape, *widths(x, 32), reach=0, least_rows=8, enough=2048)
        launch(
            wrap_triton(activate),
            lambda meta: (tiles.programs,),
            x,
            weight.contiguous(),
            bias.contiguous(),
            y,
            *x.shape[1:],
            *x.stride(),
            *geometry(tiles),
            configs=configs(tiles),
            key=("channels", "height", "width", "LAST"),
            LAST=last,
            CHANNELS=tiles.channels,
            COLUMNS=tiles.columns,
        )
    return y


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, need_x: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_weight, grad_bias = (
        gradient_of(tensor, zero=x.numel() == 0) if need_weights else x.new_empty(0) for tensor in (weight, bias)
    )
    if x.numel() == 0 or not (need_x or need_weights):
        return grad_x, grad_weight, grad_bias
    last = is_channels_last(x)
    tiles = cut(x.shape, *widths(x, 8), reach=1, least_rows=16, enough=1024)
    partial = x.new_empty((10, tiles.parts, x.shape[1]) if need_weights else (0,), dtype=torch.float32)
    launch(
        wrap_triton(differentiate),
        lambda meta: (tiles.programs,),
        like_layout(grad_out, x),
        x,
        weight.contiguous(),
        bias.contiguous(),
        grad_x,
        partial,
        tiles.scratch(x, rows=2, reach=1),
        *x.shape[1:],
        *x.stride(),
        *tiles.pitches(last, 1),
        *geometry(tiles),
        tiles.parts,
        configs=configs(tiles),
        key=("channels", "height", "width", "LAST"),
        LAST=last,
        CHANNELS=tiles.channels,
        COLUMNS=tiles.columns,
        HALO=tiles.halo,
        NEED_X=need_x,
        NEED_WEIGHTS=need_weights,
    )
    if need_weights:
        launch(
            wrap_triton(reduce),
            lambda meta: (ceil_div(x.shape[1], meta["CHANNELS"]), ceil_div(10, meta["SUMS"])),
            partial,
            grad_weight,
            grad_bias,
            tiles.parts,
            x.shape[1],
            configs=REDUCE,
        )
    return grad_x, grad_weight, grad_bias


def widths(x: Tensor, channels: int) -> tuple[int, int]:
    """Channels and columns of a program: ``channels`` where they lie together, else all columns it can have."""
    columns = min(power_of_2(x.shape[3]), 256 // channels if is_channels_last(x) else 256)
    return 256 // columns, columns


def configs(tiles: Tiles) -> list[triton.Config]:
    return [config(warps(tiles.lanes, each)) for each in (2, 1, 4)]


def geometry(tiles: Tiles) -> tuple[int, int, int, int]:
    return tiles.blocks, tiles.across, tiles.strips, tiles.rows


# Strides that were known to be one would make the compiler give each thread neighbours along memory, and shifts need others.
@triton.jit(do_not_specialize=["stride_c", "stride_w"])
def activate(
    x,  # [N, C, H, W]
    weight,  # [C, 1, 3, 3]
    bias,  # [C]
    y,  # like x
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    blocks,
    across,
    strips,
    rows,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    own_channel, lane, channel, column, inside, own, offset, first, end = lanes_of(
        blocks, across, strips, rows, channels, height, width, stride_n, stride_c, stride_w, LAST, CHANNELS, COLUMNS, 0
    )
    taps, b = load_taps(weight, bias, channel, channels)
    pending = zeros(offset.to(tl.float32), 3)
    for row in range(first - 1, end + 1):
        pending, center = convolve(
            pending, taps, x + offset + row * stride_h, row, column, channel, channels, height, width, stride_w
        )
        z = pending[0] + b
        target = y + offset + (row - 1) * stride_h
        tl.store(target, z * below(z), mask=inside & (row > first))
        pending = push(pending, tl.zeros_like(z))


@triton.jit(do_not_specialize=["stride_c", "stride_w", "pitch_c", "pitch_w"])
def differentiate(
    grad_out,  # like x
    x,  # [N, C, H, W]
    weight,  # [C, 1, 3, 3]
    bias,  # [C]
    grad_x,  # like x
    partial,  # [10, parts, C]
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
    strips,
    rows,
    parts,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALO: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
):
    own_channel, lane, channel, column, inside, own, offset, first, end = lanes_of(
        blocks, across, strips, rows, channels, height, width, stride_n, stride_c, stride_w, LAST, CHANNELS, COLUMNS, HALO
    )
    taps, b = load_taps(weight, bias, channel, channels)

    STEP: tl.constexpr = CHANNELS if LAST else 1  # from a column to the next in the scratch rows
    ROW: tl.constexpr = CHANNELS * (COLUMNS + 2)
    here = scratch_rows(scratch, own_channel, lane, pitch_c, pitch_w, 2, COLUMNS, 1, ROW, STEP)

    pending = zeros(offset.to(tl.float32), 3)  # rows of z
    gradients = zeros(pending[0], 3)  # rows of grad_x
    window = zeros(pending[0], 3)  # rows of x, zero where another program owns it
    sums = zeros(pending[0], 10)
    for row in range(first - 2, end + 2):
        at = row * stride_h + offset
        pending, center = convolve(pending, taps, x + at, row, column, channel, channels, height, width, stride_w)
        window = push(window, tl.where(own & (row >= first) & (row < end), center, 0.0))
        z = pending[0] + b
        pending = push(pending, tl.zeros_like(z))
        # Row row - 1 of z is complete, and that of the gradient with it. Of two scratch rows one is written while the other may
        # still be read by threads that are behind.
        known = inside & (row > 0) & (row <= height)
        g = tl.load(grad_out + at - stride_h, mask=known, other=0.0).to(tl.float32)
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327  # of the normal distribution
        d = tl.where(known, g * (below(z) + z * density), 0.0)
        written = here + (row & 1) * ROW
        tl.store(written, d)
        tl.debug_barrier()
        new, old = (), sums
        shifted = (tl.load(written + STEP), d, tl.load(written - STEP))
        sums = ()
        for dy in tl.static_range(3):
            total = gradients[dy]
            for dx in tl.static_range(3):
                total += taps[3 * dy + dx] * shifted[dx]
                sums = sums + (old[3 * dy + dx] + window[dy] * shifted[dx],)
            new = new + (total,)
        sums = sums + (old[9] + tl.where(own & (row > first) & (row <= end), d, 0.0),)
        if NEED_X:
            tl.store(grad_x + at - 2 * stride_h, new[0], mask=own & (row >= first + 2))
        gradients = push(new, tl.zeros_like(d))
    if NEED_WEIGHTS:
        for i in tl.static_range(10):
            store_sum(partial, i, sums[i], blocks, parts, channels, CHANNELS, LAST, 1)


@triton.jit
def load_taps(weight, bias, channel, channels):
    taps = ()
    for i in tl.static_range(9):
        taps = taps + (tl.load(weight + channel * 9 + i, mask=channel < channels, other=0.0).to(tl.float32),)
    return taps, tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)


@triton.jit
def convolve(pending, taps, x, row, column, channel, channels, height, width, stride_w):
    """Adds a row of x, to which x points, to the three rows of z that it reaches, row - 1 to row + 1. Returns the row too."""
    known = (channel < channels) & (row >= 0) & (row < height)
    shifted = ()
    for dx in tl.static_range(3):
        inside = known & (column + (dx - 1) >= 0) & (column + (dx - 1) < width)
        shifted = shifted + (tl.load(x + (dx - 1) * stride_w, mask=inside, other=0.0).to(tl.float32),)
    new = ()
    for i in tl.static_range(3):
        total = pending[i]
        for dx in tl.static_range(3):
            total += taps[3 * (2 - i) + dx] * shifted[dx]
        new = new + (total,)
    return new, shifted[1]


@triton.jit
def below(z):
    """The normal distribution function."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def reduce(partial, grad_weight, grad_bias, parts, channels, SUMS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    total, index, channel = add_up(partial, parts, channels, 10, SUMS, CHANNELS, PARTS)
    store_sums(grad_weight, total, index, channel, channels, 0, 9)
    store_sums(grad_bias, total, index, channel, channels, 9, 1)
