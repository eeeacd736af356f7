"""The filters of msca_strips, for the Triton kernels forward and backward: how they are packed, and rows of an image filtered.

Tuples hold rows, ROWS of them a step; what is called pending are rows that other steps have begun or will complete.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stencil import Tiles, cut, zeros
from .._triton import power_of_2

SIZES = tl.constexpr((7, 11, 21))  # of a type that Inductor copies with the kernels
BRANCHES = tl.constexpr(len(SIZES.value))
REACH = tl.constexpr(max(SIZES.value) // 2)
TAPS = tl.constexpr(26 + sum(2 * size + 2 for size in SIZES.value))
HALO = 2 + REACH.value  # columns and rows that an output needs on either side


def pack(weights: Sequence[Tensor]) -> Tensor:
    """All taps and biases as [TAPS, C]: 5x5, bias, then for every branch row filter, bias, column filter, bias."""
    return torch.cat([weight.reshape(weight.shape[0], -1).T for weight in weights])


def most_rows(configs: Sequence[triton.Config]) -> int:
    """Rows that programs of any of the configurations keep in scratch memory: those of this step, and those ahead."""
    return 2 * max(config.kwargs["ROWS"] for config in configs)


def tiles_of(shape: Sequence[int], last: bool, most: int) -> Tiles:
    """How an image is cut: whole rows where they are short enough, and strips only where programs are few.

    A program has at most 8 channels in channels_last, and as many as it takes to fill its threads in contiguous images.
    """
    columns = min(power_of_2(shape[3], at_least=16), 128 if last else 256)
    channels = min(most // columns, 8) if last else max(128 // columns, 1)
    return cut(shape, channels, columns, reach=HALO, least_rows=32, enough=512)


def covered(size: int, parts: int, length: int, halo: int) -> int:
    """Elements of ``size`` that parts of this length read, with a halo on either side as far as there are elements."""
    return sum(min((i + 1) * length + halo, size) - max(i * length - halo, 0) for i in range(parts))


# Compile-time arithmetic lives in functions: Triton makes a tensor of every number that is assigned to a name.
@triton.constexpr_function
def size_of(branch):
    return SIZES.value[branch]


@triton.constexpr_function
def has_tap(branch, distance):
    return abs(distance) <= SIZES.value[branch] // 2


@triton.constexpr_function
def row_tap(branch, distance):
    """The row filter's tap for the element that many columns right of the output's."""
    return first_tap(branch) + SIZES.value[branch] // 2 + distance


@triton.constexpr_function
def row_bias(branch):
    return first_tap(branch) + SIZES.value[branch]


@triton.constexpr_function
def column_tap(branch, distance):
    """The column filter's tap for the element that many rows below the output's."""
    return row_bias(branch) + 1 + SIZES.value[branch] // 2 + distance


@triton.constexpr_function
def column_bias(branch):
    return first_tap(branch) + 2 * SIZES.value[branch] + 1


@triton.constexpr_function
def first_tap(branch):
    return 26 + sum(2 * size + 2 for size in SIZES.value[:branch])


@triton.jit
def load_shifted(rows, ROWS: tl.constexpr, STEP: tl.constexpr, ROW: tl.constexpr):
    """Scratch rows from two columns left of the lanes' places to two columns right of them."""
    shifted = ()
    for i in tl.static_range(ROWS):
        for dx in tl.static_range(-2, 3):
            shifted = shifted + (tl.load(rows + (i * ROW + dx * STEP)),)
    return shifted


@triton.jit
def convolve(pending, shifted, taps, ROWS: tl.constexpr, SIGN: tl.constexpr):
    """Adds rows to those that the 5x5 filter makes of them, from two above the first to two below the last.

    SIGN is -1 for the transposed filter.
    """
    pending = pending + zeros(shifted[0], ROWS)
    new = ()
    for j in tl.static_range(ROWS + 4):
        total = pending[j]
        for i in tl.static_range(ROWS):
            if i - j + 2 >= -2 and i - j + 2 <= 2:
                for dx in tl.static_range(-2, 3):
                    total += taps[12 + SIGN * (5 * (i - j + 2) + dx)] * shifted[5 * i + dx + 2]
        new = new + (total,)
    return new


@triton.jit
def filter_rows(
    rows,
    taps,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    ROW: tl.constexpr,
    SIGN: tl.constexpr,
):
    """The row filters of scratch rows: all rows of the first branch, then of the second, and so on."""
    results = zeros(tl.load(rows), BRANCHES * ROWS)
    for distance in tl.static_range(-REACH, REACH + 1):
        old = results
        results = ()
        values = ()
        for i in tl.static_range(ROWS):
            values = values + (tl.load(rows + (i * ROW + distance * STEP)),)
        for branch in tl.static_range(BRANCHES):
            for i in tl.static_range(ROWS):
                total = old[branch * ROWS + i]
                if has_tap(branch, distance):
                    total += taps[row_tap(branch, SIGN * distance)] * values[i]
                results = results + (total,)
    return results


@triton.jit
def filter_columns(
    pending,
    results,
    rows,
    taps,
    ROWS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Adds rows and their row filters' results to the rows that the column filters make of them, REACH above to REACH below."""
    pending = pending + zeros(rows[0], ROWS)
    new = ()
    for j in tl.static_range(2 * REACH + ROWS):
        total = pending[j]
        for i in tl.static_range(ROWS):
            if j == i + REACH:
                total += rows[i]
            for branch in tl.static_range(BRANCHES):
                if has_tap(branch, i - j + REACH):
                    total += taps[column_tap(branch, SIGN * (i - j + REACH))] * results[branch * ROWS + i]
        new = new + (total,)
    return new
