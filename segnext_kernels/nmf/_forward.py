"""The Triton kernels of nmf's steps and of its approximation; triton.py launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from ._factors import (
    EPS,
    chunk_products,
    load_rows,
    load_tile,
    logits,
    multiply,
    product,
    softmax,
    store_product,
    store_rows,
    store_sum,
    store_tile,
    sum_rows,
    times_square,
)


@triton.jit
def held_logits(x, bases, column, rows, columns, rank: tl.constexpr, stride_d, stride_n, COLUMNS: tl.constexpr,
                RANK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x^T B of some columns, and the tiles of x that were read for it, held in registers."""
    total, tiles = tl.zeros([COLUMNS, RANK], tl.float32), ()
    for i in tl.static_range(CHUNKS):
        tiles = tiles + (load_tile(x, i * ROWS, column, rows, columns, stride_d, stride_n, ROWS, COLUMNS),)
        total += product(tl.trans(tiles[i]), load_rows(bases, i * ROWS, rows, rank, ROWS, RANK), PRECISION, TERMS=2)
    return total, tiles


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    """A tuple of so many sums."""
    total = ()
    for _ in tl.static_range(COUNT):
        total = total + (tl.zeros([ROWS, RANK], tl.float32),)
    return total


@triton.jit
def add_products(total, tiles, coef, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """The sums with the products of held tiles and their columns' coefficients added."""
    new = ()
    for i in tl.static_range(CHUNKS):
        new = new + (total[i] + product(tiles[i], coef, PRECISION, TERMS=2),)
    return new


# Steps that differ in their number alone are one kernel, and so are batches.
@triton.jit(do_not_specialize=["read", "write", "batch", "blocks"])
def step(
    x,  # [B, D, N]
    coef,  # [slots, B, N, R]
    bases,  # [slots, B, D, R]
    grams,  # [slots, B, blocks, R, R]
    sums,  # [B, parts, D, R]
    squares,  # [slots, B, parts, R, R]
    scratch,  # [B, parts, R, R]
    read,
    write,
    batch,
    part,
    stride_b,
    stride_d,
    stride_n,
    rows,
    columns,
    rank: tl.constexpr,
    blocks,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Updates the coefficients of a part of the columns and adds x C and C^T C over them."""
    b, place = tl.program_id(0).to(tl.int64), tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    x += b * stride_b
    before = coef + (read * batch + b) * columns * rank
    coef += (write * batch + b) * columns * rank
    bases += (read * batch + b) * rows * rank
    gram = scratch + place * rank * rank
    store_sum(gram, grams + (read * batch + b) * blocks * rank * rank, blocks, rank, RANK)
    tl.debug_barrier()  # what a thread stores, others read
    start = tl.program_id(1) * part
    stop = tl.minimum(start + part, columns)
    total = zeros(CHUNKS if HELD else 0, ROWS, RANK)
    OF_LOGITS: tl.constexpr = "split" if FIRST and PRECISION == "rounded" else PRECISION  # the softmax's are not rounded
    for column in range(start, stop, COLUMNS):
        if HELD:
            p, tiles = held_logits(x, bases, column, rows, columns, rank, stride_d, stride_n,
                                   COLUMNS, RANK, ROWS, CHUNKS, OF_LOGITS)  # fmt: skip
        else:
            p = logits(x, bases, column, rows, columns, rank, stride_d, stride_n,
                       COLUMNS, RANK, ROWS, CHUNKS, STAGES, OF_LOGITS)  # fmt: skip
        if FIRST:
            store_rows(before, softmax(p, column, columns, rank, COLUMNS, RANK), column, columns, rank, COLUMNS, RANK)
            tl.debug_barrier()
        c = load_rows(before, column, columns, rank, COLUMNS, RANK) * p
        c /= times_square(before, column, columns, gram, rank, COLUMNS, RANK, PRECISION) + EPS
        tl.debug_barrier()  # these may be the same coefficients
        store_rows(coef, c, column, columns, rank, COLUMNS, RANK)
        if HELD:
            total = add_products(total, tiles, c, CHUNKS, PRECISION)
    squares += (read * batch * tl.num_programs(1) + place) * rank * rank
    sums += place * rows * rank
    if HELD:
        for i in tl.static_range(CHUNKS):
            store_rows(sums, total[i], i * ROWS, rows, rank, ROWS, RANK)
    tl.debug_barrier()
    store_product(squares, coef, coef, start, stop, columns, rank, COLUMNS, RANK, PRECISION)
    if not HELD:
        for i in range(CHUNKS):
            some = chunk_products(x, coef, i * ROWS, start, stop, rows, columns, rank, stride_d, stride_n,
                                  ROWS, RANK, COLUMNS, STAGES, PRECISION)  # fmt: skip
            store_rows(sums, some, i * ROWS, rows, rank, ROWS, RANK)


@triton.jit(do_not_specialize=["slot", "batch", "parts"])
def finish(
    given,  # [B, D, R]
    sums,  # [B, parts, D, R]
    squares,  # [slots, B, parts, R, R]
    bases,  # [slots, B, D, R]
    grams,  # [slots, B, blocks, R, R]
    products,  # [slots, B, D, R]
    scratch,  # [B, blocks, R, R]
    slot,
    batch,
    rows,
    parts,
    rank: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds up what the programs of a step found and updates some rows of the bases; at first takes the given ones."""
    b, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    matrix = slot * batch + b
    if FIRST:
        new = load_rows(given + b * rows * rank, row, rows, rank, ROWS, RANK)
    else:
        total = sum_rows(sums + b * parts * rows * rank, parts, row, rows, rank, ROWS, RANK)
        old, squares = bases + matrix * rows * rank, squares + matrix * parts * rank * rank
        new = load_rows(old, row, rows, rank, ROWS, RANK) * total
        square = scratch + (b * tl.num_programs(1) + tl.program_id(1)) * rank * rank
        store_sum(square, squares, parts, rank, RANK)
        tl.debug_barrier()  # what a thread stores, others read
        new /= times_square(old, row, rows, square, rank, ROWS, RANK, PRECISION) + EPS
        tl.debug_barrier()  # the new ones may take the place of the old ones
        if KEEP:
            store_rows(products + matrix * rows * rank, total, row, rows, rank, ROWS, RANK)
            matrix += batch
    bases += matrix * rows * rank
    store_rows(bases, new, row, rows, rank, ROWS, RANK)
    tl.debug_barrier()
    grams += (matrix * tl.num_programs(1) + tl.program_id(1)) * rank * rank
    store_product(grams, bases, bases, row, row + ROWS, rows, rank, ROWS, RANK, PRECISION)


@triton.jit(do_not_specialize=["blocks"])
def approximate(
    x,  # [B, D, N]
    y,  # [B, D, N]
    coef,  # [1, B, N, R]
    bases,  # [1, B, D, R]
    grams,  # [1, B, blocks, R, R]
    scratch,  # [B, parts, R, R]
    part,
    stride_b,
    stride_d,
    stride_n,
    y_stride_b,
    y_stride_d,
    y_stride_n,
    rows,
    columns,
    rank: tl.constexpr,
    blocks,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Updates the coefficients of a part of the columns once more and multiplies the factors."""
    b, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * part
    x, y = x + b * stride_b, y + b * y_stride_b
    coef, bases = coef + b * columns * rank, bases + b * rows * rank
    gram = scratch + (b * tl.num_programs(1) + tl.program_id(1)) * rank * rank
    store_sum(gram, grams + b * blocks * rank * rank, blocks, rank, RANK)
    tl.debug_barrier()  # what a thread stores, others read
    OF_LOGITS: tl.constexpr = "split" if FIRST and PRECISION == "rounded" else PRECISION
    for column in range(start, tl.minimum(start + part, columns), COLUMNS):
        p = logits(x, bases, column, rows, columns, rank, stride_d, stride_n,
                   COLUMNS, RANK, ROWS, CHUNKS, STAGES, OF_LOGITS)  # fmt: skip
        if FIRST:
            store_rows(coef, softmax(p, column, columns, rank, COLUMNS, RANK), column, columns, rank, COLUMNS, RANK)
            tl.debug_barrier()
        c = load_rows(coef, column, columns, rank, COLUMNS, RANK) * p
        c /= times_square(coef, column, columns, gram, rank, COLUMNS, RANK, PRECISION) + EPS
        tl.debug_barrier()  # the new ones take the place of the old ones
        store_rows(coef, c, column, columns, rank, COLUMNS, RANK)
        tl.debug_barrier()
        for i in range(CHUNKS):
            tile = multiply(bases, i * ROWS, rows, coef, column, columns, rank, ROWS, COLUMNS, RANK, PRECISION)
            store_tile(y, tile, i * ROWS, column, rows, columns, y_stride_d, y_stride_n, ROWS, COLUMNS)
