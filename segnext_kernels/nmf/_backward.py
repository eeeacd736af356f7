"""The Triton kernels of nmf's gradients; triton_backward.py launches them."""

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
def two_logits(x, bases, others, column, rows, columns, rank: tl.constexpr, stride_d, stride_n, COLUMNS: tl.constexpr,
               RANK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """x^T B for two B of some columns, from one pass over x."""
    first, second = tl.zeros([COLUMNS, RANK], tl.float32), tl.zeros([COLUMNS, RANK], tl.float32)
    for i in tl.range(CHUNKS, num_stages=STAGES):
        tile = tl.trans(load_tile(x, i * ROWS, column, rows, columns, stride_d, stride_n, ROWS, COLUMNS))
        first += product(tile, load_rows(bases, i * ROWS, rows, rank, ROWS, RANK), PRECISION)
        second += product(tile, load_rows(others, i * ROWS, rows, rank, ROWS, RANK), PRECISION)
    return first, second


@triton.jit(do_not_specialize=["slot", "batch", "blocks"])
def step_backward(
    x,  # [B, D, N]
    grad_out,  # [B, D, N]
    coef,  # [slots, B, N, R]
    bases,  # [slots, B, D, R]
    grams,  # [slots, B, blocks, R, R]
    grad_coef,  # [B, N, R]
    grad_quotients,  # [B, N, R]
    grad_logits,  # [slots, B, N, R]
    grad_products,  # [slots, B, D, R]
    grad_squares,  # [B, blocks, R, R]
    sums,  # [B, parts, D, R]
    squares,  # [B, parts, R, R]
    scratch,  # [B, parts, 2, R, R]
    slot,
    batch,
    part,
    stride_b,
    stride_d,
    stride_n,
    out_stride_b,
    out_stride_d,
    out_stride_n,
    rows,
    columns,
    rank: tl.constexpr,
    blocks,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    FIRST: tl.constexpr,
    SOFTMAX: tl.constexpr,
    EXACT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Goes back through the update C' = C p / q, p = x^T B and q = C B^T B, for a part of the columns.

    The gradient of C' comes from y after the last update, otherwise from what followed: the products x C' and squares C'^T C'.
    """
    b, place = tl.program_id(0).to(tl.int64), tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    matrix = slot * batch + b
    x, grad_out = x + b * stride_b, grad_out + b * out_stride_b
    coef += matrix * columns * rank
    bases += matrix * rows * rank
    grad_coef += b * columns * rank
    grad_quotients += b * columns * rank
    grad_logits += matrix * columns * rank
    grad_products += (matrix + batch) * rows * rank
    gram = scratch + 2 * place * rank * rank
    store_sum(gram, grams + matrix * blocks * rank * rank, blocks, rank, RANK)
    grad_square = gram + rank * rank
    if not LAST:
        store_sum(grad_square, grad_squares + b * blocks * rank * rank, blocks, rank, RANK, BOTH=True)
    tl.debug_barrier()  # what a thread stores, others read
    after = coef + batch * columns * rank
    start = tl.program_id(1) * part
    stop = tl.minimum(start + part, columns)
    for column in range(start, stop, COLUMNS):
        if LAST:
            p = logits(x, bases, column, rows, columns, rank, stride_d, stride_n,
                       COLUMNS, RANK, ROWS, CHUNKS, STAGES, PRECISION)  # fmt: skip
            grad = logits(grad_out, bases, column, rows, columns, rank, out_stride_d, out_stride_n,
                          COLUMNS, RANK, ROWS, CHUNKS, STAGES, PRECISION)  # fmt: skip
        else:
            p, grad = two_logits(x, bases, grad_products, column, rows, columns, rank, stride_d, stride_n,
                                 COLUMNS, RANK, ROWS, CHUNKS, STAGES, PRECISION)  # fmt: skip
        if FIRST:
            store_rows(coef, softmax(p, column, columns, rank, COLUMNS, RANK), column, columns, rank, COLUMNS, RANK)
            tl.debug_barrier()
        if not LAST:
            grad += load_rows(grad_coef, column, columns, rank, COLUMNS, RANK)
            grad += times_square(after, column, columns, grad_square, rank, COLUMNS, RANK, PRECISION)
        q = times_square(coef, column, columns, gram, rank, COLUMNS, RANK, PRECISION) + EPS
        c = load_rows(coef, column, columns, rank, COLUMNS, RANK)
        grad /= q
        grad_p = grad * c
        if EXACT:
            new = c * p / q
            store_rows(grad_quotients, -grad * new, column, columns, rank, COLUMNS, RANK)
            tl.debug_barrier()
            grad *= p
            grad += times_square(grad_quotients, column, columns, gram, rank, COLUMNS, RANK, PRECISION)
            if SOFTMAX:
                grad_p += c * (grad - tl.sum(grad * c, 1)[:, None])
            else:
                store_rows(grad_coef, grad, column, columns, rank, COLUMNS, RANK)
            if LAST:
                store_rows(after, new, column, columns, rank, COLUMNS, RANK)
        store_rows(grad_logits, grad_p, column, columns, rank, COLUMNS, RANK)
    if EXACT:
        tl.debug_barrier()
        squares += place * rank * rank
        store_product(squares, coef, grad_quotients, start, stop, columns, rank, COLUMNS, RANK, PRECISION)
        sums += place * rows * rank
        for i in range(CHUNKS):
            some = chunk_products(x, grad_logits, i * ROWS, start, stop, rows, columns, rank, stride_d, stride_n,
                                  ROWS, RANK, COLUMNS, STAGES, PRECISION)  # fmt: skip
            if LAST:
                some += chunk_products(grad_out, after, i * ROWS, start, stop, rows, columns, rank,
                                       out_stride_d, out_stride_n, ROWS, RANK, COLUMNS, STAGES, PRECISION)  # fmt: skip
            store_rows(sums, some, i * ROWS, rows, rank, ROWS, RANK)


@triton.jit(do_not_specialize=["slot", "batch", "parts"])
def finish_backward(
    out,  # [B, D, R]
    sums,  # [B, parts, D, R]
    squares,  # [B, parts, R, R]
    bases,  # [slots, B, D, R]
    products,  # [slots, B, D, R]
    coef_squares,  # [slots, B, parts, R, R], whose sums are C^T C
    grad_products,  # [slots, B, D, R]
    grad_squares,  # [B, blocks, R, R]
    carry,  # [B, D, R]
    scratch,  # [B, blocks, 2, R, R]
    slot,
    batch,
    rows,
    parts,
    rank: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds up the gradient of some rows of the bases and goes back through the update B' = B s / q, s = x C, q = B C^T C."""
    b, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    matrix, place = slot * batch + b, b * tl.num_programs(1) + tl.program_id(1)
    before, carry, square = matrix - batch, carry + b * rows * rank, scratch + 2 * place * rank * rank
    store_sum(square, squares + b * parts * rank * rank, parts, rank, RANK, BOTH=True)
    if not FIRST:
        store_sum(square + rank * rank, coef_squares + before * parts * rank * rank, parts, rank, RANK)
    tl.debug_barrier()  # what a thread stores, others read
    grad = times_square(bases + matrix * rows * rank, row, rows, square, rank, ROWS, RANK, PRECISION)
    grad += sum_rows(sums + b * parts * rows * rank, parts, row, rows, rank, ROWS, RANK)
    if not LAST:
        grad += load_rows(carry, row, rows, rank, ROWS, RANK)
    if FIRST:
        store_rows(out + b * rows * rank, grad, row, rows, rank, ROWS, RANK)
    else:
        new, old, square = bases + matrix * rows * rank, bases + before * rows * rank, square + rank * rank
        grad /= times_square(old, row, rows, square, rank, ROWS, RANK, PRECISION) + EPS
        grad_q = -grad * load_rows(new, row, rows, rank, ROWS, RANK)
        some = grad * load_rows(old, row, rows, rank, ROWS, RANK)
        store_rows(grad_products + matrix * rows * rank, some, row, rows, rank, ROWS, RANK)
        tl.debug_barrier()  # for a while the gradient of q takes the place of the old carry
        store_rows(carry, grad_q, row, rows, rank, ROWS, RANK)
        tl.debug_barrier()
        store_product(grad_squares + place * rank * rank, old, carry, row, row + ROWS, rows, rank, ROWS, RANK, PRECISION)
        grad *= load_rows(products + before * rows * rank, row, rows, rank, ROWS, RANK)
        grad += times_square(carry, row, rows, square, rank, ROWS, RANK, PRECISION)
        tl.debug_barrier()
        store_rows(carry, grad, row, rows, rank, ROWS, RANK)


@triton.jit(do_not_specialize=["last", "batch"])
def gradient_of_x(
    grad_x,  # [B, D, N]
    coef,  # [slots, B, N, R]
    bases,  # [slots, B, D, R]
    grad_logits,  # [slots, B, N, R]
    grad_products,  # [slots, B, D, R]
    last,
    batch,
    stride_b,
    stride_d,
    stride_n,
    rows,
    columns,
    rank: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of it: what came through x^T B and x C in all the steps."""
    wide = tl.cdiv(columns, COLUMNS)
    tiles = wide * tl.cdiv(rows, ROWS)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row, column = tile // wide * ROWS, tile % wide * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(last + 1):
        matrix = i * batch + b
        left, right = bases + matrix * rows * rank, grad_logits + matrix * columns * rank
        total += multiply(left, row, rows, right, column, columns, rank, ROWS, COLUMNS, RANK, PRECISION)
        if i > 0:
            left, right = grad_products + matrix * rows * rank, coef + matrix * columns * rank
            total += multiply(left, row, rows, right, column, columns, rank, ROWS, COLUMNS, RANK, PRECISION)
    store_tile(grad_x + b * stride_b, total, row, column, rows, columns, stride_d, stride_n, ROWS, COLUMNS)
