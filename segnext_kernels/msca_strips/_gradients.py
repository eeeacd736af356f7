"""The kernels of msca_strips' gradients in Triton; triton_backward.py launches them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._stencil import lanes_of, load_rows, load_taps, scratch_rows, store_rows, store_sum, zeros
from ._filters import (
    BRANCHES,
    REACH,
    TAPS,
    column_bias,
    column_tap,
    convolve,
    filter_columns,
    filter_rows,
    has_tap,
    load_shifted,
    row_bias,
    row_tap,
)

# Inlined by Triton, the marches take three times as long to compile; NVIDIA's assembler inlines what is called, AMD's compiler
# saves registers around a call.
march = triton.jit(noinline=torch.version.hip is None)


@triton.jit(do_not_specialize=["stride_c", "stride_w", "pitch_c", "pitch_w"])
def gradients(
    grad_out,  # like x
    x,  # [N, C, H, W]
    filters,  # [TAPS, C]
    grad_x,  # like x
    partial,  # [TAPS, parts, C]
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
    ROWS: tl.constexpr,
):
    """One of the three marches, which neighbouring programs make over the same rows at about the same time."""
    TOGETHER: tl.constexpr = 3 if NEED_WEIGHTS else 1
    which = tl.program_id(0) % TOGETHER
    if which == 0:
        inputs(grad_out, x, filters, grad_x, partial, scratch, channels, height, width, stride_n, stride_c, stride_h, stride_w,
               pitch_c, pitch_w, blocks, across, strips, rows, parts, LAST, CHANNELS, COLUMNS, HALO, TOGETHER,
               NEED_X, NEED_WEIGHTS, ROWS)  # fmt: skip
    elif which == 1:
        taps(grad_out, x, filters, partial, scratch, channels, height, width, stride_n, stride_c, stride_h, stride_w,
             pitch_c, pitch_w, blocks, across, strips, rows, parts, LAST, CHANNELS, COLUMNS, HALO, TOGETHER,
             False, ROWS)  # fmt: skip
    else:
        taps(grad_out, x, filters, partial, scratch, channels, height, width, stride_n, stride_c, stride_h, stride_w,
             pitch_c, pitch_w, blocks, across, strips, rows, parts, LAST, CHANNELS, COLUMNS, HALO, TOGETHER,
             True, ROWS)  # fmt: skip


@march
def inputs(
    grad_out,  # like x
    x,  # [N, C, H, W]
    filters,  # [TAPS, C]
    grad_x,  # like x
    partial,  # [TAPS, parts, C]
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
    TOGETHER: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradients of x and of the 5x5 filters."""
    own_channel, lane, channel, column, inside, own, offset, first, end = lanes_of(
        blocks, across, strips, rows, channels, height, width, stride_n, stride_c, stride_w,
        LAST, CHANNELS, COLUMNS, HALO, TOGETHER,
    )  # fmt: skip
    held = load_taps(filters + channel, channels, channel < channels, TAPS)

    STEP: tl.constexpr = CHANNELS if LAST else 1  # from a column to the next in the scratch rows
    ROW: tl.constexpr = CHANNELS * (COLUMNS + 2 * REACH)
    g_rows = scratch_rows(scratch, own_channel, lane, pitch_c, pitch_w, 2 * ROWS, COLUMNS, REACH, ROW, STEP)
    d_rows = g_rows + ROWS * ROW

    start = tl.maximum(first - (REACH + 2), 0)
    last = tl.minimum(end + (REACH + 2), height)
    da = zeros(offset.to(tl.float32), 2 * REACH)
    dx = zeros(da[0], 4)
    window = zeros(da[0], 4)  # rows of x, zero where another program owns it
    sums = zeros(da[0], 26)
    ahead = load_rows(grad_out + offset, start, last, stride_h, inside, ROWS)
    for row in range(start, end + (REACH + 2), ROWS):
        g = ahead
        store_rows(g_rows, g, ROWS, ROW)
        tl.debug_barrier()
        ahead = load_rows(grad_out + offset, row + ROWS, last, stride_h, inside, ROWS)
        filtered = filter_rows(g_rows, held, ROWS, STEP, ROW, -1)
        da = filter_columns(da, filtered, g, held, ROWS, -1)
        complete = ()
        for i in tl.static_range(ROWS):
            there = inside & (row + (i - REACH) >= 0) & (row + (i - REACH) < height)
            complete = complete + (tl.where(there, da[i], 0.0),)
        da = da[ROWS:]
        store_rows(d_rows, complete, ROWS, ROW)
        tl.debug_barrier()
        shifted = load_shifted(d_rows, ROWS, STEP, ROW)
        dx = convolve(dx, shifted, held, ROWS, -1)
        if NEED_X:
            for i in tl.static_range(ROWS):
                done = row + (i - (REACH + 2))
                tl.store(grad_x + offset + done * stride_h, dx[i], mask=own & (done >= first) & (done < end))
        dx = dx[ROWS:]
        if NEED_WEIGHTS:
            window = window + load_rows(x + offset, row - (REACH - 2), end, stride_h, own, ROWS, first)
            new = ()
            for dy in tl.static_range(5):
                for t in tl.static_range(5):
                    total = sums[5 * dy + t]
                    for i in tl.static_range(ROWS):
                        total += shifted[5 * i + 4 - t] * window[i + dy]
                    new = new + (total,)
            total = sums[25]
            for i in tl.static_range(ROWS):
                mine = own & (row + (i - REACH) >= first) & (row + (i - REACH) < end)
                total += tl.where(mine, complete[i], 0.0)
            sums = new + (total,)
            window = window[ROWS:]
    if NEED_WEIGHTS:
        for i in tl.static_range(26):
            store_sum(partial, i, sums[i], blocks, parts, channels, CHANNELS, LAST, TOGETHER)


@march
def taps(
    grad_out,  # like x
    x,  # [N, C, H, W]
    filters,  # [TAPS, C]
    partial,  # [TAPS, parts, C]
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
    TOGETHER: tl.constexpr,
    OF_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradients of the row filters' taps, or of the column filters'."""
    own_channel, lane, channel, column, inside, own, offset, first, end = lanes_of(
        blocks, across, strips, rows, channels, height, width, stride_n, stride_c, stride_w,
        LAST, CHANNELS, COLUMNS, HALO, TOGETHER,
    )  # fmt: skip
    held = load_taps(filters + channel, channels, channel < channels, TAPS)

    STEP: tl.constexpr = CHANNELS if LAST else 1  # from a column to the next in the scratch rows
    ROW: tl.constexpr = CHANNELS * (COLUMNS + 2 * REACH)
    xs = scratch_rows(scratch, own_channel, lane, pitch_c, pitch_w, 2 * ROWS, COLUMNS, REACH, ROW, STEP)
    a_rows = xs + ROWS * ROW

    start = tl.maximum(first - 2, 0)
    last = tl.minimum(end + 2, height)
    stem = zeros(offset.to(tl.float32), 4)
    sums = zeros(stem[0], tap_place(0, REACH + 1))
    biases = zeros(stem[0], BRANCHES)
    ahead = load_rows(x + offset, start, last, stride_h, inside, ROWS)
    # From REACH above to REACH below the rows of a, zero where another program owns them: every product is counted once.
    window = load_rows(grad_out + offset, start - (REACH + 2), height, stride_h, own, 2 * REACH)
    for row in range(start, end + 2, ROWS):
        store_rows(xs, ahead, ROWS, ROW)
        tl.debug_barrier()
        ahead = load_rows(x + offset, row + ROWS, last, stride_h, inside, ROWS)
        window = window + load_rows(grad_out + offset, row + (REACH - 2), height, stride_h, own, ROWS)
        stem = convolve(stem, load_shifted(xs, ROWS, STEP, ROW), held, ROWS, 1)
        a = ()
        for i in tl.static_range(ROWS):
            there = inside & (row + (i - 2) >= 0) & (row + (i - 2) < height)
            a = a + (tl.where(there, stem[i] + held[25], 0.0),)
        stem = stem[ROWS:]
        store_rows(a_rows, a, ROWS, ROW)
        tl.debug_barrier()
        old = sums
        sums = ()
        old_biases = biases
        biases = ()
        if OF_ROWS:
            nothing = tl.zeros_like(a[0])
            spread = ()
            for branch in tl.static_range(BRANCHES):
                bias = old_biases[branch]
                for i in tl.static_range(ROWS):
                    total = nothing
                    for distance in tl.static_range(-REACH, REACH + 1):
                        if has_tap(branch, distance):
                            total += held[column_tap(branch, distance)] * window[i + REACH - distance]
                    total = tl.where((row + (i - 2) >= first) & (row + (i - 2) < end), total, 0.0)
                    spread = spread + (total,)
                    bias += total
                biases = biases + (bias,)
            for distance in tl.static_range(-REACH, REACH + 1):
                values = ()
                for i in tl.static_range(ROWS):
                    values = values + (tl.load(a_rows + (i * ROW + distance * STEP)),)
                for branch in tl.static_range(BRANCHES):
                    if has_tap(branch, distance):
                        total = old[tap_place(branch, distance)]
                        for i in tl.static_range(ROWS):
                            total += spread[branch * ROWS + i] * values[i]
                        sums = sums + (total,)
        else:
            filtered = filter_rows(a_rows, held, ROWS, STEP, ROW, 1)
            results = ()
            for branch in tl.static_range(BRANCHES):
                bias = old_biases[branch]
                for i in tl.static_range(ROWS):
                    there = (row + (i - 2) >= first) & (row + (i - 2) < end)
                    results = results + (tl.where(there, filtered[branch * ROWS + i] + held[row_bias(branch)], 0.0),)
                    if branch == 0:
                        bias += tl.where(there, window[i + REACH], 0.0)
                biases = biases + (bias,)
            for distance in tl.static_range(-REACH, REACH + 1):
                for branch in tl.static_range(BRANCHES):
                    if has_tap(branch, distance):
                        total = old[tap_place(branch, distance)]
                        for i in tl.static_range(ROWS):
                            total += results[branch * ROWS + i] * window[i + REACH - distance]
                        sums = sums + (total,)
        window = window[ROWS:]
    for branch in tl.static_range(BRANCHES):
        if OF_ROWS:
            store_sum(partial, row_bias(branch), biases[branch], blocks, parts, channels, CHANNELS, LAST, TOGETHER)
        else:  # the biases of all column filters have one gradient
            store_sum(partial, column_bias(branch), biases[0], blocks, parts, channels, CHANNELS, LAST, TOGETHER)
        for distance in tl.static_range(-REACH, REACH + 1):
            if has_tap(branch, distance):
                index = row_tap(branch, distance) if OF_ROWS else column_tap(branch, distance)
                total = sums[tap_place(branch, distance)]
                store_sum(partial, index, total, blocks, parts, channels, CHANNELS, LAST, TOGETHER)


@triton.constexpr_function
def tap_place(branch, distance):
    """Where the sum for a tap is kept: by distance, then by branch."""
    return sum(has_tap(b, d) for d in range(-REACH.value, distance) for b in range(BRANCHES.value)) + sum(
        has_tap(b, distance) for b in range(branch)
    )
