"""msca_strips backward in Triton: three marches down the image as in forward, in one launch, and a sum over the programs.

``inputs``: da = g + sum_k H_k^T * V_k^T * g; dx = W5^T * da; dW5 = sum da x. That is forward with transposed filters, the 5x5
last. ``taps``: a and its row filters r as in forward, and s_k = V_k^T * g from 21 rows of g in registers; dV = sum r g, or
dH = sum s a. The sums of both would not fit into a thread's registers beside what makes them, so that it runs once for each.

Each march reads g and x, that of ``inputs`` writes dx. The programs that make the three over the same rows are neighbours, so
that they run together: memory sees one reading of each, the cache the rest; see ``traffic``. Every lane keeps its sums of taps
until it is through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._register import gradient_of, like_layout
from .._stencil import REDUCE, Tiles, add_up, store_sums, warps
from .._triton import ceil_div, config, is_channels_last, launch, wrap_triton
from ._filters import (
    BRANCHES,
    HALO,
    REACH,
    TAPS,
    column_bias,
    covered,
    first_tap,
    most_rows,
    pack,
    row_bias,
    size_of,
    tiles_of,
)
from ._gradients import gradients


def backward(
    grad_out: Tensor, x: Tensor, weights: Sequence[Tensor], need_x: bool, need_weights: bool
) -> tuple[Tensor, list[Tensor]]:
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grads = [gradient_of(weight, zero=x.numel() == 0) for weight in weights] if need_weights else []
    if x.numel() == 0 or not (need_x or need_weights):
        return grad_x, grads
    last = is_channels_last(x)
    tiles = tiles_of(x.shape, last, most=256)
    filters = pack(weights)
    partial = x.new_empty((TAPS.value, tiles.parts, x.shape[1]) if need_weights else (0,), dtype=torch.float32)
    together = 3 if need_weights else 1
    launch(
        wrap_triton(gradients),
        lambda meta: (together * tiles.programs,),
        like_layout(grad_out, x),
        x,
        filters,
        grad_x,
        partial,
        tiles.scratch(x, rows=most_rows(configs(tiles)), reach=REACH.value, together=together),
        *x.shape[1:],
        *x.stride(),
        *tiles.pitches(last, REACH.value),
        tiles.blocks,
        tiles.across,
        tiles.strips,
        tiles.rows,
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
            lambda meta: (ceil_div(x.shape[1], meta["CHANNELS"]), ceil_div(TAPS.value, meta["SUMS"])),
            partial,
            *grads,
            tiles.parts,
            x.shape[1],
            configs=REDUCE,
        )
    return grad_x, grads


def configs(tiles: Tiles) -> list[triton.Config]:
    return [config(warps(tiles.lanes, 1), ROWS=rows) for rows in (2, 1)]


def traffic(shape: Sequence[int], channels_last: bool) -> tuple[float, float]:
    """What the programs read and write of g, x and dx, over reading g and x and writing dx once: from memory, and in all.

    From memory three neighbours read once, whichever of them is first; the others find it in the cache.
    """
    tiles = tiles_of(shape, channels_last, most=256)
    _, _, height, width = shape

    def read(row_halo: int, column_halo: int) -> float:
        columns = covered(width, tiles.across, tiles.columns - 2 * tiles.halo, column_halo)
        return columns * covered(height, tiles.strips, tiles.rows, row_halo) / (height * width)

    # Of g inputs reads the rows and columns within reach of its own, taps only such rows; of x inputs its own, taps two more.
    of_g, of_x = read(HALO, tiles.halo), read(2, tiles.halo)
    once = of_g + of_x + 1
    everything = of_g + read(0, 0) + 2 * (read(HALO, 0) + of_x) + 1
    return once / 3, everything / 3


@triton.jit
def reduce(
    partial,
    grad_w5,
    grad_b5,
    grad_wh0,
    grad_bh0,
    grad_wv0,
    grad_bv0,
    grad_wh1,
    grad_bh1,
    grad_wv1,
    grad_bv1,
    grad_wh2,
    grad_bh2,
    grad_wv2,
    grad_bv2,
    parts,
    channels,
    SUMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    total, index, channel = add_up(partial, parts, channels, TAPS, SUMS, CHANNELS, PARTS)
    store_sums(grad_w5, total, index, channel, channels, 0, 25)
    store_sums(grad_b5, total, index, channel, channels, 25, 1)
    rows = (grad_wh0, grad_wh1, grad_wh2)
    row_biases = (grad_bh0, grad_bh1, grad_bh2)
    columns = (grad_wv0, grad_wv1, grad_wv2)
    column_biases = (grad_bv0, grad_bv1, grad_bv2)
    for branch in tl.static_range(BRANCHES):
        store_sums(rows[branch], total, index, channel, channels, first_tap(branch), size_of(branch))
        store_sums(row_biases[branch], total, index, channel, channels, row_bias(branch), 1)
        store_sums(columns[branch], total, index, channel, channels, row_bias(branch) + 1, size_of(branch))
        store_sums(column_biases[branch], total, index, channel, channels, column_bias(branch), 1)
