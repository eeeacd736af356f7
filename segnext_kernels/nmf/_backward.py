"""The Triton kernels of nmf's gradients; triton.py launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from ._factors import (
    EPS,
    chunk_products,
    inner,
    load_rows,
    load_square,
    load_tile,
    logits,
    product,
    softmax,
    store_rows,
    store_tile,
    sum_rows,
    sum_squares,
)


@triton.jit
def two_logits(x, bases, others, column, rows, columns, rank: tl.constexpr, stride_d, stride_n, COLUMNS: tl.constexpr,
               RANK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x^T B for two B of some columns, from one pass over x."""
    first, second = tl.zeros([COLUMNS, RANK], tl.float32), tl.zeros([COLUMNS, RANK], tl.float32)
    for i in range(CHUNKS):
        tile = tl.trans(load_tile(x, i * ROWS, column, rows, columns, stride_d, stride_n, ROWS, COLUMNS))
        first += product(tile, load_rows(bases, i * ROWS, rows, rank, ROWS, RANK), PRECISION)
        second += product(tile, load_rows(others, i * ROWS, rows, rank, ROWS, RANK), PRECISION)
    return first, second


@triton.jit
def step_backward(
    x,  # [B, D, N]
    grad_out,  # [B, D, N]
    coef,  # [slots, B, N, R]
    bases,  # [slots, B, D, R]
    grams,  # [slots, B, blocks, R, R]
    grad_coef,  # [B, N, R]
    grad_logits,  # [slots, B, N, R]
    grad_products,  # [slots, B, D, R]
    grad_squares,  # [B, blocks, R, R]
    sums,  # [B, parts, D, R]
    squares,  # [B, parts, R, R]
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
):
    """Goes back through the update C' = C p / q, p = x^T B and q = C B^T B, for a part of the columns.

    The gradient of C' comes from y after the last update, otherwise from what followed: the products x C' and squares C'^T C'.
    """
    b, place = tl.program_id(1).to(tl.int64), tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    matrix = slot * batch + b
    x, grad_out = x + b * stride_b, grad_out + b * out_stride_b
    coef += matrix * columns * rank
    bases += matrix * rows * rank
    grad_coef += b * columns * rank
    grad_logits += matrix * columns * rank
    grad_products += (matrix + batch) * rows * rank
    gram = sum_squares(grams + matrix * blocks * rank * rank, blocks, rank, RANK)
    if not LAST:
        grad_square = sum_squares(grad_squares + b * blocks * rank * rank, blocks, rank, RANK)
        grad_square += tl.trans(grad_square)
    start = tl.program_id(0) * part
    stop = tl.minimum(start + part, columns)
    square = tl.zeros([RANK, RANK], tl.float32)
    for column in range(start, stop, COLUMNS):
        if LAST:
            p = logits(x, bases, column, rows, columns, rank, stride_d, stride_n, COLUMNS, RANK, ROWS, CHUNKS, PRECISION)
            grad = logits(grad_out, bases, column, rows, columns, rank, out_stride_d, out_stride_n,
                          COLUMNS, RANK, ROWS, CHUNKS, PRECISION)  # fmt: skip
        else:
            p, grad = two_logits(x, bases, grad_products, column, rows, columns, rank, stride_d, stride_n,
                                 COLUMNS, RANK, ROWS, CHUNKS, PRECISION)  # fmt: skip
        if FIRST:
            c = softmax(p, column, columns, rank, COLUMNS, RANK)
        else:
            c = load_rows(coef, column, columns, rank, COLUMNS, RANK)
        q = inner(c, gram, PRECISION) + EPS
        new = c * p / q
        if not LAST:
            grad += load_rows(grad_coef, column, columns, rank, COLUMNS, RANK) + inner(new, grad_square, PRECISION)
        grad /= q
        grad_p = grad * c
        if EXACT:
            grad_q = -grad * new
            square += inner(tl.trans(c), grad_q, PRECISION)
            grad = grad * p + inner(grad_q, gram, PRECISION)
            if SOFTMAX:
                grad_p += c * (grad - tl.sum(grad * c, 1)[:, None])
            else:
                store_rows(grad_coef, grad, column, columns, rank, COLUMNS, RANK)
            if LAST:
                store_rows(coef + batch * columns * rank, new, column, columns, rank, COLUMNS, RANK)
        store_rows(grad_logits, grad_p, column, columns, rank, COLUMNS, RANK)
    if EXACT:
        store_rows(squares + place * rank * rank, square, 0, rank, rank, RANK, RANK)
        sums += place * rows * rank
        tl.debug_barrier()  # what other threads stored is read below
        for i in range(CHUNKS):
            some = chunk_products(x, grad_logits, i * ROWS, start, stop, rows, columns, rank, stride_d, stride_n,
                                  ROWS, RANK, COLUMNS, PRECISION)  # fmt: skip
            if LAST:
                some += chunk_products(grad_out, coef + batch * columns * rank, i * ROWS, start, stop, rows, columns, rank,
                                       out_stride_d, out_stride_n, ROWS, RANK, COLUMNS, PRECISION)  # fmt: skip
            store_rows(sums, some, i * ROWS, rows, rank, ROWS, RANK)


@triton.jit
def finish_backward(
    out,  # [B, D, R]
    sums,  # [B, parts, D, R]
    squares,  # [B, parts, R, R]
    bases,  # [slots, B, D, R]
    products,  # [slots, B, D, R]
    coef_grams,  # [slots, B, R, R]
    grad_products,  # [slots, B, D, R]
    grad_squares,  # [B, blocks, R, R]
    carry,  # [B, D, R]
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
    b, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    matrix = slot * batch + b
    new = load_rows(bases + matrix * rows * rank, row, rows, rank, ROWS, RANK)
    square = sum_squares(squares + b * parts * rank * rank, parts, rank, RANK)
    grad = inner(new, square + tl.trans(square), PRECISION)
    grad += sum_rows(sums + b * parts * rows * rank, parts, row, rows, rank, ROWS, RANK)
    if not LAST:
        grad += load_rows(carry + b * rows * rank, row, rows, rank, ROWS, RANK)
    if FIRST:
        store_rows(out + b * rows * rank, grad, row, rows, rank, ROWS, RANK)
    else:
        before = matrix - batch
        old = load_rows(bases + before * rows * rank, row, rows, rank, ROWS, RANK)
        gram = load_square(coef_grams + before * rank * rank, rank, RANK)
        grad /= inner(old, gram, PRECISION) + EPS
        grad_q = -grad * new
        store_rows(grad_products + matrix * rows * rank, grad * old, row, rows, rank, ROWS, RANK)
        direct = grad * load_rows(products + before * rows * rank, row, rows, rank, ROWS, RANK)
        store_rows(carry + b * rows * rank, direct + inner(grad_q, gram, PRECISION), row, rows, rank, ROWS, RANK)
        block = (b * tl.num_programs(0) + tl.program_id(0)) * rank * rank
        store_rows(grad_squares + block, inner(tl.trans(old), grad_q, PRECISION), 0, rank, rank, RANK, RANK)


@triton.jit
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
    b, wide = tl.program_id(1).to(tl.int64), tl.cdiv(columns, COLUMNS)
    row, column = tl.program_id(0) // wide * ROWS, tl.program_id(0) % wide * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(last + 1):
        matrix = i * batch + b
        left = load_rows(bases + matrix * rows * rank, row, rows, rank, ROWS, RANK)
        right = load_rows(grad_logits + matrix * columns * rank, column, columns, rank, COLUMNS, RANK)
        total += inner(left, tl.trans(right), PRECISION)
        if i > 0:
            left = load_rows(grad_products + matrix * rows * rank, row, rows, rank, ROWS, RANK)
            right = load_rows(coef + matrix * columns * rank, column, columns, rank, COLUMNS, RANK)
            total += inner(left, tl.trans(right), PRECISION)
    store_tile(grad_x + b * stride_b, total, row, column, rows, columns, stride_d, stride_n, ROWS, COLUMNS)
