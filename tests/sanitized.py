"""Runs every CPU kernel on odd shapes under the sanitizers; test_memory_safety.py starts it. Argument: the module's folder,
and "planted" for a deliberate overrun that they must report."""

from __future__ import annotations

import itertools
import sys

import numpy as np

sys.path.insert(0, sys.argv[1])
import raw_kernels

rng = np.random.default_rng(0)
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.uint16}
PACKED_DTYPES = ("float32", "bfloat16")
SIZES = [(1, 1, 1, 1), (2, 3, 1, 40), (1, 17, 33, 2), (2, 16, 9, 13), (1, 33, 5, 37), (1, 1, 3, 8)]
STRIPS = [25, 1, 7, 1, 7, 1, 11, 1, 11, 1, 21, 1, 21, 1]
MATRICES = [(1, 1, 1, 1, 0), (2, 5, 45, 3, 2), (1, 70, 130, 64, 1), (1, 33, 300, 17, 1), (2, 7, 16, 100, 1)]
MATRICES += [(2, 32, 2080, 17, 2), (1, 64, 96, 16, 1), (2, 64, 96, 64, 1)]  # whole tiles of the processor's matrix unit
MATRICES += [(1, 512, 96, 3, 1)]  # columns that share a set of the caches


def normal(shape, dtype):
    values = np.abs(rng.standard_normal(shape)).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(DTYPES[dtype])


def poisoned(like, dtype):
    """Memory full of NaN, of which a kernel must leave none."""
    array = np.empty(like.shape, DTYPES[dtype])
    array.fill(0x7FC1 if dtype == "bfloat16" else np.nan)
    return array


def finite(array):
    return ((array & 0x7F80) != 0x7F80).all() if array.dtype == np.uint16 else np.isfinite(array).all()


def images(dtype, size, channels_last):
    n, c, h, w = size
    shape = (n, h, w, c) if channels_last else size
    x, grad_out = normal(shape, dtype), normal(shape, dtype)
    weights = [normal((c, taps), dtype) for taps in STRIPS]
    y, grad_x, grads = poisoned(x, dtype), poisoned(x, dtype), [poisoned(weight, dtype) for weight in weights]
    raw_kernels.msca_strips(x, weights, y, channels_last)
    raw_kernels.msca_strips_backward(grad_out, x, weights, grad_x, grads, channels_last)
    yield from (y, grad_x, *grads)
    weight, bias = normal((c, 9), dtype), normal((c,), dtype)
    y, grad_x, *grads = (poisoned(like, dtype) for like in (x, x, weight, bias))
    raw_kernels.dwconv_gelu(x, weight, bias, y, channels_last)
    raw_kernels.dwconv_gelu_backward(grad_out, x, weight, bias, grad_x, *grads, channels_last)
    yield from (y, grad_x, *grads)
    keep = normal((n,), "float64" if dtype == "float64" else "float32")
    out, grad_y, grad_scale = poisoned(x, dtype), poisoned(x, dtype), poisoned(bias, dtype)
    raw_kernels.scale_add(x, grad_out, bias, keep, out, channels_last)
    raw_kernels.scale_add_backward(grad_out, x, bias, keep, grad_y, grad_scale, channels_last)
    yield from (out, grad_y, grad_scale)


def matrices(dtype, size, transposed):
    b, d, n, rank, steps = size
    shape = (b, n, d) if transposed else (b, d, n)
    accumulator = "float64" if dtype == "float64" else "float32"
    x, grad_out, bases = normal(shape, dtype), normal(shape, dtype), normal((b, d, rank), accumulator)
    again = {}
    for one_step, keep in itertools.product((False, True), repeat=2):
        y, grad_x, grad_bases = poisoned(x, dtype), poisoned(x, dtype), poisoned(bases, accumulator)
        matrix = x.swapaxes(1, 2) if transposed else x
        size = raw_kernels.nmf_factors_size(matrix, rank, steps, one_step) if keep else 0
        factors = np.full(size, np.nan, DTYPES[accumulator])
        rounded = one_step  # where nothing is kept, forward knows no one_step; so half of these calls round
        none = np.empty(0, DTYPES[accumulator])
        raw_kernels.nmf(x, bases, steps, rounded, one_step, factors, none, y, transposed)
        raw_kernels.nmf_backward(grad_out, x, bases, factors, none, steps, one_step, grad_x, grad_bases, none, transposed)
        if dtype.startswith("float"):
            tolerance = 1e-2 if dtype == "float16" else 1e-4
            assert np.allclose(grad_x, again.setdefault(one_step, grad_x), tolerance, tolerance * np.abs(grad_x).max())
        yield from (y, grad_x, grad_bases)
        projection, grad_projection = normal((d, d), accumulator), poisoned(np.empty((d, d)), accumulator)
        y, grad_x, grad_bases = poisoned(x, dtype), poisoned(x, dtype), poisoned(bases, accumulator)
        raw_kernels.nmf(x, bases, steps, rounded, one_step, factors, projection, y, transposed)
        raw_kernels.nmf_backward(
            grad_out, x, bases, factors, projection, steps, one_step, grad_x, grad_bases, grad_projection, transposed
        )
        yield from (y, grad_x, grad_bases, grad_projection)


def upsampled(dtype, size, channels_last):
    n, c, h, w = size
    shape = (n, h, w, c) if channels_last else size
    for out in ((1, 1), (5, 40), (3 * h, 8 * w)):
        logits, labels = normal(shape, dtype), np.full((n, *out), -1)
        raw_kernels.upsample_argmax(logits, labels, channels_last)
        assert ((labels >= 0) & (labels < c)).all()
        target = np.where(rng.random(labels.shape) < 0.2, 255, rng.integers(0, c, labels.shape))
        weights, grad = normal((c,), "float64" if dtype == "float64" else "float32"), poisoned(logits, dtype)
        assert np.isfinite(raw_kernels.upsample_cross_entropy(logits, target, weights, grad, channels_last))
        yield grad


def packed(outputs, inputs, dtype):
    panels = -(-outputs // 32)
    return normal((panels, -(-inputs // 2), 32, 2) if dtype == "bfloat16" else (panels, inputs, 32), dtype)


def inference(dtype, size, channels_last):
    """channels_last: of conv_act's x; the others take no other layout."""
    n, c, h, w = size
    columns, groups = 2 * c + 5, c if c % 4 else 4
    x, bias, wide = normal((n, h, w, c), dtype), normal((c,), "float32"), normal((columns,), "float32")
    for kernel, stride in ((1, 1), (3, 2)):
        y = poisoned(np.empty((n, -(-h // stride), -(-w // stride), columns)), dtype)
        image = x if channels_last else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        raw_kernels.conv_act(image, packed(columns, c * kernel**2, dtype), wide, kernel, stride, True, y, channels_last)
        yield y
    y = poisoned(x, dtype)
    raw_kernels.spatial_attention(x, packed(c, c, dtype), bias, [normal((c, taps), dtype) for taps in STRIPS], y)
    yield y
    for norm in (False, True):
        y, depthwise = poisoned(x, dtype), normal((columns, 9), "float32")
        raw_kernels.mlp(x, packed(columns, c, dtype), wide, depthwise, packed(c, columns, dtype), bias, norm, y)
        yield y
    y = poisoned(x, dtype)
    raw_kernels.group_norm_relu(x, bias, groups, normal(x.shape, dtype), y)
    yield y
    for rank, rounded in ((3, False), (32, True)):
        y, bases, out = poisoned(x, dtype), np.abs(normal((n, c, rank), "float32")), normal((c, c), "float32")
        raw_kernels.hamburger(x, packed(c, c, dtype), bias, bases, 2, out, groups, rounded, y)
        yield y
    maps = [x, normal((n, -(-h // 2), -(-w // 3), c), dtype)]
    y = poisoned(np.empty((n, h, w, columns)), dtype)
    raw_kernels.resize_concat_conv(maps, [packed(columns, c, dtype) for _ in maps], wide, y)
    yield y


def loops():
    """Every item is given once, to threads that take neighbours in order; one that is slow leaves its own to the others."""
    for count, least, most, backward in itertools.product((1, 3, 7, 800), (1, 5), (0, 1, 6), (False, True)):
        if backward and most > 0:
            continue  # loops that go backward go item by item
        given = raw_kernels.items_of_threads(count, least, most, backward)
        assert sorted(itertools.chain(*given)) == list(range(count)), (count, least, most, backward)
        begun = max(count // least, 1)
        assert sum(map(bool, given)) <= begun, (count, least, given)
        if begun == 1:
            assert given[0] == list(range(count))[:: -1 if backward else 1]
        if count == 800 and most <= 1:
            assert len(given[0]) < 50 < 800 / 8, given[0]


def main():
    if "planted" in sys.argv:
        x = normal((1, 16, 9, 13), "float32")
        return raw_kernels.dwconv_gelu(x, normal((16, 9), "float32"), normal((16,), "float32"), x[:, :, :-1].copy(), False)
    runs = [(images, SIZES, DTYPES), (matrices, MATRICES, DTYPES), (upsampled, SIZES, DTYPES)]
    for run, sizes, dtypes in (*runs, (inference, [*SIZES, (1, 3, 2, 300)], PACKED_DTYPES)):
        for dtype, size, layout in itertools.product(dtypes, sizes, (False, True)):
            for array in run(dtype, size, layout):
                assert finite(array), (run.__name__, dtype, size, layout)
    loops()
    print("clean")


main()
