"""What the forward and backward Triton kernels of nmf share: tiles of x, products, and the update of the coefficients."""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)


@triton.jit
def product(x, factor, PRECISION: tl.constexpr, TERMS: tl.constexpr = 3):
    """x times a factor of float32. Of 16-bit x little is lost: the factor is "split" into a sum.

    With bfloat16 of three bfloat16, or two, where that leaves the registers for a tile, or one, which is the factor "rounded";
    float16 would overflow, so x is taken as TF32 and the factor as two of these.
    """
    if PRECISION == "rounded":
        return tl.dot(x, factor.to(tl.bfloat16))
    elif PRECISION == "split":
        if x.dtype == tl.bfloat16:
            high = factor.to(tl.bfloat16)
            rest = factor - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            total = tl.dot(x, middle, tl.dot(x, high))
            if TERMS == 3:
                total = tl.dot(x, (rest - middle.to(tl.float32)).to(tl.bfloat16), total)
            return total
        else:
            x = x.to(tl.float32)
            high = (factor.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            return tl.dot(x, factor - high, tl.dot(x, high, input_precision="tf32"), input_precision="tf32")
    else:
        return tl.dot(x.to(tl.float32), factor, input_precision=PRECISION)


@triton.jit
def inner(a, b, PRECISION: tl.constexpr):
    """The product of two factors."""
    if PRECISION == "split" or PRECISION == "rounded":
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_block(factor, row, column, rows, rank: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of a factor [rows, rank] that begins at (row, column), zero beyond it."""
    row, column = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < rank)[None, :]
    return tl.load(factor + row[:, None] * rank + column[None, :], mask=inside, other=0.0)


@triton.jit
def load_rows(factor, row, rows, rank: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    """Some rows of a factor [rows, rank], zero beyond it."""
    return load_block(factor, row, 0, rows, rank, ROWS, RANK)


@triton.jit
def store_block(factor, value, row, column, rows, rank: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < rank)[None, :]
    tl.store(factor + row[:, None] * rank + column[None, :], value, mask=inside)


@triton.jit
def store_rows(factor, value, row, rows, rank: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    store_block(factor, value, row, 0, rows, rank, ROWS, RANK)


# Matrices of a high rank do not fit into registers as a whole: these products go through the rank piece by piece, from memory.


@triton.jit
def times_square(left, row, rows, square, rank: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """Some rows of a factor times a matrix [rank, rank]."""
    PIECE: tl.constexpr = RANK if RANK < 32 else 32
    total = tl.zeros([ROWS, RANK], tl.float32)
    for k in range(0, RANK, PIECE):
        some = load_block(left, row, k, rows, rank, ROWS, PIECE)
        total += inner(some, load_block(square, k, 0, rank, rank, PIECE, RANK), PRECISION)
    return total


@triton.jit
def multiply(left, row, rows, right, column, columns, rank: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Some rows of a factor times some rows of another, transposed."""
    PIECE: tl.constexpr = RANK if RANK < 32 else 32
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, RANK, PIECE):
        other = tl.trans(load_block(right, column, k, columns, rank, COLUMNS, PIECE))
        total += inner(load_block(left, row, k, rows, rank, ROWS, PIECE), other, PRECISION)
    return total


@triton.jit
def store_product(square, left, right, start, stop, rows, rank: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """The product [rank, rank] of some rows of two factors, the left one transposed."""
    PIECE: tl.constexpr = RANK if RANK < 32 else 32
    for k in range(0, RANK, PIECE):
        total = tl.zeros([PIECE, RANK], tl.float32)
        for row in range(start, stop, ROWS):
            some = tl.trans(load_block(left, row, k, rows, rank, ROWS, PIECE))
            total += inner(some, load_rows(right, row, rows, rank, ROWS, RANK), PRECISION)
        store_block(square, total, k, 0, rank, rank, PIECE, RANK)


@triton.jit
def store_sum(square, squares, count, rank: tl.constexpr, RANK: tl.constexpr, BOTH: tl.constexpr = False):
    """The sum of ``count`` matrices [rank, rank], with ``BOTH`` of their transposes as well."""
    PIECE: tl.constexpr = RANK if RANK < 32 else 32
    for k in range(0, RANK, PIECE):
        total = tl.zeros([PIECE, RANK], tl.float32)
        for i in tl.range(count, loop_unroll_factor=16 if RANK == 16 else 4):  # so that loads wait together
            total += load_block(squares + i * rank * rank, k, 0, rank, rank, PIECE, RANK)
            if BOTH:
                total += tl.trans(load_block(squares + i * rank * rank, 0, k, rank, rank, RANK, PIECE))
        store_block(square, total, k, 0, rank, rank, PIECE, RANK)


@triton.jit
def load_tile(x, row, column, rows, columns, stride_d, stride_n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a matrix of x's shape that begins at (row, column), zero beyond it."""
    d, n = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (d < rows)[:, None] & (n < columns)[None, :]
    return tl.load(x + d[:, None] * stride_d + n[None, :] * stride_n, mask=inside, other=0.0)


@triton.jit
def store_tile(y, value, row, column, rows, columns, stride_d, stride_n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    d, n = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (d < rows)[:, None] & (n < columns)[None, :]
    place = y + d[:, None] * stride_d + n[None, :] * stride_n
    tl.store(place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def softmax(logits, column, columns, rank: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr):
    """Over the rank; zero beyond the matrix."""
    logits = tl.where((tl.arange(0, RANK) < rank)[None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    inside = (column + tl.arange(0, COLUMNS) < columns)[:, None]
    return tl.where(inside, powers / tl.sum(powers, 1)[:, None], 0.0)


@triton.jit
def logits(x, bases, column, rows, columns, rank: tl.constexpr, stride_d, stride_n, COLUMNS: tl.constexpr,
           RANK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """x^T B of some columns."""
    total = tl.zeros([COLUMNS, RANK], tl.float32)
    for i in tl.range(CHUNKS, num_stages=STAGES):
        tile = load_tile(x, i * ROWS, column, rows, columns, stride_d, stride_n, ROWS, COLUMNS)
        total += product(tl.trans(tile), load_rows(bases, i * ROWS, rows, rank, ROWS, RANK), PRECISION)
    return total


@triton.jit
def chunk_products(x, coef, row, start, stop, rows, columns, rank: tl.constexpr, stride_d, stride_n, ROWS: tl.constexpr,
                   RANK: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x C of some rows over a part of the columns."""
    total = tl.zeros([ROWS, RANK], tl.float32)
    for column in tl.range(start, stop, COLUMNS, num_stages=STAGES):
        tile = load_tile(x, row, column, rows, columns, stride_d, stride_n, ROWS, COLUMNS)
        total += product(tile, load_rows(coef, column, columns, rank, COLUMNS, RANK), PRECISION)
    return total


@triton.jit
def sum_rows(parts_of, parts, row, rows, rank: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    """The sum of some rows of ``parts`` matrices [rows, rank]."""
    total = tl.zeros([ROWS, RANK], tl.float32)
    for part in tl.range(parts, loop_unroll_factor=16 if RANK == 16 else 4):
        total += load_rows(parts_of + part * rows * rank, row, rows, rank, ROWS, RANK)
    return total
