"""What the Triton kernels of dwconv_gelu and msca_strips share: how images are cut, and how rows move within a program.

A program owns lanes, each one column of one channel, and marches down a strip of rows. Rows that are not complete yet wait in
registers, one tuple element a row. What neighbours need of each other goes through a scratch row in global memory, which stays
in the caches: written, ``tl.debug_barrier()``, read at shifted places. That barrier is ``bar.sync`` on NVIDIA's GPUs, and a
release, ``s_barrier`` and an acquire of the workgroup on AMD's: what a program stores before it, all of the program sees after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import ceil_div, config, power_of_2

REDUCE = (config(4, SUMS=16, CHANNELS=16, PARTS=8),)  # of add_up


@dataclass(frozen=True)
class Tiles:
    """How [N, C, H, W] is cut into programs."""

    channels: int  # of a program
    columns: int  # of a program, with those on either side that other programs own
    halo: int  # how many those are
    blocks: int  # programs that it takes for all channels
    across: int  # for all columns
    strips: int  # for all rows
    rows: int  # of a strip
    parts: int  # programs of one block of channels

    @property
    def lanes(self) -> int:
        return self.channels * self.columns

    @property
    def programs(self) -> int:
        return self.parts * self.blocks

    def scratch(self, x: Tensor, rows: int, reach: int, together: int = 1) -> Tensor:
        """Memory for ``rows`` rows of float32 a program, with ``reach`` columns on either side of it."""
        size = together * self.programs * rows * self.channels * (self.columns + 2 * reach)
        return torch.empty(size, dtype=torch.float32, device=x.device)

    def pitches(self, last: bool, reach: int) -> tuple[int, int]:
        """The strides of channels and columns in a scratch row."""
        return (1, self.channels) if last else (self.columns + 2 * reach, 1)


def warps(lanes: int, each: int) -> int:
    """How many warps a program has whose threads have ``each`` lanes."""
    return max(lanes // (each * (64 if torch.version.hip else 32)), 1)


def cut(shape: Sequence[int], channels: int, columns: int, reach: int, least_rows: int, enough: int) -> Tiles:
    """Cuts an image.

    Args:
        shape: [N, C, H, W].
        channels, columns: of a program, powers of two; channels are fewer where the image has fewer.
        reach: columns that a program needs beside those that it owns, where it has not all of them.
        least_rows: shorter strips would read too much twice.
        enough: programs; rows are cut into strips only while there are fewer.
    """
    images, _, height, width = shape
    channels = min(channels, power_of_2(shape[1]))
    halo = reach if width > columns else 0
    blocks, across = ceil_div(shape[1], channels), ceil_div(width, columns - 2 * halo)
    strips = min(ceil_div(enough, images * blocks * across), max(height // least_rows, 1))
    rows = ceil_div(height, strips)
    strips = ceil_div(height, rows)
    return Tiles(channels, columns, halo, blocks, across, strips, rows, images * across * strips)


@triton.jit
def place(blocks, across, strips, TOGETHER: tl.constexpr):
    """The program's block of channels (the next program has the next), tile of columns, strip of rows, and image."""
    program = tl.program_id(0) // TOGETHER
    block = program % blocks
    program = program // blocks
    tile = program % across
    program = program // across
    return block, tile, program % strips, (program // strips).to(tl.int64)


@triton.jit
def lanes(COUNT: tl.constexpr, DOWN: tl.constexpr):
    """0, 1, ... as [COUNT, 1] or [1, COUNT]."""
    index = tl.arange(0, COUNT)
    return index[:, None] if DOWN else index[None, :]


@triton.jit
def lanes_of(
    blocks,
    across,
    strips,
    rows,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_w,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALO: tl.constexpr,
    TOGETHER: tl.constexpr = 1,
):
    """What a program works on: the same for as many programs as are TOGETHER.

    Returns its lanes' indices, channels and columns, whether those are in the image and whether the program owns them, the
    offset of the lanes' places in row 0, and the first row that the program owns and the first that it does not.
    """
    block, tile, strip, image = place(blocks, across, strips, TOGETHER)
    own_channel = lanes(CHANNELS, not LAST)
    lane = lanes(COLUMNS, LAST)
    channel = block * CHANNELS + own_channel
    column = tile * (COLUMNS - 2 * HALO) - HALO + lane
    inside = (channel < channels) & (column >= 0) & (column < width)
    own = inside & (lane >= HALO) & (lane < COLUMNS - HALO)
    offset = image * stride_n + channel.to(tl.int64) * stride_c + column.to(tl.int64) * stride_w
    first = strip.to(tl.int64) * rows
    return own_channel, lane, channel, column, inside, own, offset, first, tl.minimum(first + rows, height)


@triton.jit
def scratch_rows(
    scratch,
    own_channel,
    lane,
    pitch_c,
    pitch_w,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
    REACH: tl.constexpr,
    ROW: tl.constexpr,
    STEP: tl.constexpr,
):
    """The lanes' places in the first of the program's COUNT scratch rows, and zeros on both sides of all of them.

    A row has ROW elements, and STEP from a column to the next.
    """
    here = scratch + tl.program_id(0).to(tl.int64) * (COUNT * ROW) + own_channel * pitch_c + (lane + REACH) * pitch_w
    nothing = tl.zeros(here.shape, tl.float32)
    for i in tl.static_range(COUNT):
        tl.store(here + (i * ROW - REACH * STEP), nothing, mask=lane < REACH)
        tl.store(here + (i * ROW + REACH * STEP), nothing, mask=lane >= COLUMNS - REACH)
    return here


@triton.jit
def push(rows, new):
    """The rows move on by one: the first leaves, a new one comes."""
    return rows[1:] + (new,)


@triton.jit
def zeros(like, COUNT: tl.constexpr):
    """COUNT times zero."""
    nothing = tl.zeros_like(like)
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (nothing,)
    return rows


@triton.jit
def add_up(partial, parts, channels, COUNT, SUMS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Adds up the programs' sums, [COUNT, parts, channels], in a fixed order. Returns [SUMS, CHANNELS], and which those are."""
    index = tl.program_id(1) * SUMS + tl.arange(0, SUMS)[:, None]
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    part = tl.arange(0, PARTS)[:, None, None]
    place = partial + (index.to(tl.int64) * parts * channels + channel)[None, :, :]
    inside = ((index < COUNT) & (channel < channels))[None, :, :]
    total = tl.zeros([PARTS, SUMS, CHANNELS], tl.float32)
    for first in range(0, parts, PARTS):
        at = place + (first + part).to(tl.int64) * channels
        total += tl.load(at, mask=inside & (first + part < parts), other=0.0)
    return tl.sum(total, 0), index, channel


@triton.jit
def store_sum(partial, index, sum_of_lanes, blocks, parts, channels, CHANNELS: tl.constexpr, LAST: tl.constexpr,
              TOGETHER: tl.constexpr):  # fmt: skip
    """Stores what a program, one of TOGETHER on the same rows, has for one tap of its channels. partial: [TAPS, parts, C]."""
    program = tl.program_id(0) // TOGETHER
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.cast(parts, tl.int64) * index + program // blocks
    tl.store(partial + row * channels + channel, tl.sum(sum_of_lanes, 0 if LAST else 1), mask=channel < channels)


@triton.jit
def store_sums(grad, total, index, channel, channels, first: tl.constexpr, count: tl.constexpr):
    """Stores the sums first ... first + count - 1 as a gradient [C, count]."""
    inside = (channel < channels) & (index >= first) & (index < first + count)
    tl.store(grad + channel * count + index - first, total, mask=inside)


@triton.jit
def load_rows(x, row, last, stride_h, inside, ROWS: tl.constexpr, first=0):
    """ROWS rows of an image from ``row`` on as float32, zero before ``first`` and from ``last`` on. x points into row 0."""
    rows = ()
    for i in tl.static_range(ROWS):
        known = inside & (row + i >= first) & (row + i < last)
        rows = rows + (tl.load(x + (row + i) * stride_h, mask=known, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def store_rows(target, rows, COUNT: tl.constexpr, ROW: tl.constexpr):
    """Stores the first COUNT rows, ROW apart."""
    for i in tl.static_range(COUNT):
        tl.store(target + i * ROW, rows[i])


@triton.jit
def load_taps(taps, channels, known, COUNT: tl.constexpr):
    """COUNT numbers of every channel as float32; those that nobody uses, the compiler drops. taps: [COUNT, C]."""
    held = ()
    for i in tl.static_range(COUNT):
        held = held + (tl.load(taps + i * channels, mask=known, other=0.0).to(tl.float32),)
    return held
