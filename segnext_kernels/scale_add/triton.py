"""scale_add in Triton: every element is read and written once.

An image is a matrix of channels by pixels in either layout. Forward has a program for every tile; backward has fewer, each of
which goes over some tiles of the same channels and adds up their part of the gradient of the scale.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._register import gradient_of, like_layout
from .._stencil import add_up, store_sums
from .._triton import ceil_div, config, is_channels_last, launch, power_of_2, wrap_triton

LANES = 2048  # elements of a tile
PROGRAMS = 1024  # of backward, about, where there are so many tiles
CONFIGS = [config(warps) for warps in (4, 8)]
REDUCE = [config(4, SUMS=1, CHANNELS=16, PARTS=128)]


class Tiles(NamedTuple):
    """How images are cut; the first four are the kernels' arguments."""

    channels: int
    pixels: int
    stride_c: int
    stride_p: int
    images: int
    CHANNELS: int
    PIXELS: int

    @staticmethod
    def of(x: Tensor) -> Tiles:
        images, channels, *size = x.shape
        pixels = prod(size)
        if is_channels_last(x):
            together = 16
            while together < 256 and channels % (2 * together) == 0:  # so that few lanes are idle
                together *= 2
            return Tiles(channels, pixels, 1, channels, images, together, LANES // together)
        row = min(LANES, power_of_2(pixels))
        return Tiles(channels, pixels, pixels, 1, images, LANES // row, row)

    @property
    def blocks(self) -> int:
        """Tiles of all channels."""
        return ceil_div(self.channels, self.CHANNELS)

    @property
    def across(self) -> int:
        """Tiles of all pixels of an image."""
        return ceil_div(self.pixels, self.PIXELS)


def forward(x: Tensor, y: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() > 0:
        tiles = Tiles.of(x)
        launch(
            wrap_triton(add_scaled),
            lambda meta: (tiles.images * tiles.blocks * tiles.across,),
            x,
            like_layout(y, x),
            scale.contiguous(),
            x if keep is None else keep,
            out,
            *tiles[:4],
            tiles.blocks,
            tiles.across,
            configs=CONFIGS,
            key=("channels", "stride_c"),
            KEEP=keep is not None,
            CHANNELS=tiles.CHANNELS,
            PIXELS=tiles.PIXELS,
        )
    return out


def backward(
    grad_out: Tensor, y: Tensor, scale: Tensor, keep: Tensor | None, need_y: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    grad_y = torch.empty_like(y) if need_y else y.new_empty(0)
    grad_scale = gradient_of(scale, zero=y.numel() == 0) if need_scale else scale.new_empty(0)
    if y.numel() == 0 or not (need_y or need_scale):
        return grad_y, grad_scale
    tiles = Tiles.of(y)
    parts = min(tiles.across, max(1, PROGRAMS // (tiles.images * tiles.blocks)))  # of an image's pixels
    each = ceil_div(tiles.across, parts)
    parts = ceil_div(tiles.across, each)
    partial = y.new_empty((tiles.images * parts, tiles.channels) if need_scale else (0,), dtype=torch.float32)
    launch(
        wrap_triton(add_scaled_backward),
        lambda meta: (tiles.images * tiles.blocks * parts,),
        like_layout(grad_out, y),
        y,
        scale.contiguous(),
        scale if keep is None else keep,
        grad_y,
        partial,
        *tiles[:4],
        tiles.blocks,
        parts,
        each,
        configs=CONFIGS,
        key=("channels", "stride_c"),
        KEEP=keep is not None,
        NEED_Y=need_y,
        NEED_SCALE=need_scale,
        CHANNELS=tiles.CHANNELS,
        PIXELS=tiles.PIXELS,
    )
    if need_scale:
        launch(
            wrap_triton(reduce),
            lambda meta: (ceil_div(tiles.channels, meta["CHANNELS"]), 1),
            partial,
            grad_scale,
            tiles.images * parts,
            tiles.channels,
            configs=REDUCE,
        )
    return grad_y, grad_scale


@triton.jit
def place(channels, pixels, stride_c, blocks, parts, CHANNELS: tl.constexpr):
    """A program's image and part of the pixels, its channels, and where those of the image's first pixel are."""
    program = tl.program_id(0)
    image, part = program // (blocks * parts), program // blocks % parts
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    offset = image.to(tl.int64) * channels * pixels + channel.to(tl.int64) * stride_c
    return image, part, channel, offset[:, None]


@triton.jit
def factors(scale, keep, image, channel, channels, KEEP: tl.constexpr):
    """What an image's channels of y are multiplied with, and what all of the image is."""
    kept = 1.0
    if KEEP:
        kept = tl.load(keep + image).to(tl.float32)
    return (tl.load(scale + channel, mask=channel < channels, other=0.0).to(tl.float32) * kept)[:, None], kept


@triton.jit
def add_scaled(
    x,  # [N, C, H, W]
    y,  # like x
    scale,  # [C]
    keep,  # [N]
    out,  # like x
    channels,
    pixels,
    stride_c,
    stride_p,
    blocks,
    across,
    KEEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    image, tile, channel, offset = place(channels, pixels, stride_c, blocks, across, CHANNELS)
    factor, _ = factors(scale, keep, image, channel, channels, KEEP)
    pixel = tile.to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[None, :]
    offset, inside = offset + pixel * stride_p, (channel < channels)[:, None] & (pixel < pixels)
    added = tl.load(y + offset, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out + offset, tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + added, mask=inside)


@triton.jit
def add_scaled_backward(
    grad_out,  # like y
    y,  # [N, C, H, W]
    scale,  # [C]
    keep,  # [N]
    grad_y,  # like y
    partial,  # [N parts, C]
    channels,
    pixels,
    stride_c,
    stride_p,
    blocks,
    parts,
    each,
    KEEP: tl.constexpr,
    NEED_Y: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    image, part, channel, offset = place(channels, pixels, stride_c, blocks, parts, CHANNELS)
    factor, kept = factors(scale, keep, image, channel, channels, KEEP)
    total = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for i in range(each):
        pixel = (part.to(tl.int64) * each + i) * PIXELS + tl.arange(0, PIXELS)[None, :]
        at, inside = offset + pixel * stride_p, (channel < channels)[:, None] & (pixel < pixels)
        g = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
        if NEED_SCALE:
            total += g * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if NEED_Y:
            tl.store(grad_y + at, g * factor, mask=inside)
    if NEED_SCALE:
        to = partial + (image * parts + part).to(tl.int64) * channels + channel
        tl.store(to, tl.sum(total, 1) * kept, mask=channel < channels)


@triton.jit
def reduce(partial, grad_scale, parts, channels, SUMS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    total, index, channel = add_up(partial, parts, channels, 1, SUMS, CHANNELS, PARTS)
    store_sums(grad_scale, total, index, channel, channels, 0, 1)
