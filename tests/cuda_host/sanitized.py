"""Runs the CUDA kernels on the host under a sanitizer; test_cuda_kernels.py starts it. Arguments: the module's folder, then
"all" or the name of the one operator to run."""

from __future__ import annotations

import itertools
import sys

import numpy as np

sys.path.insert(0, sys.argv[1])
import cuda_host

rng = np.random.default_rng(0)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
# one pixel, smaller than the filters, no multiple of anything, several tiles of columns, several images in a block
SIZES = [(1, 1, 1, 1), (2, 3, 1, 40), (1, 17, 33, 2), (1, 8, 20, 72), (1, 16, 9, 13), (1, 3, 5, 300), (300, 3, 6, 5)]
TAPS = {"msca_strips": [25, 1, 7, 1, 7, 1, 11, 1, 11, 1, 21, 1, 21, 1], "dwconv_gelu": [9, 1]}


def normal(shape, dtype):
    values = rng.standard_normal(shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(DTYPES[dtype])


def main():
    operators = TAPS if sys.argv[2] == "all" else [sys.argv[2]]
    cuda_host.settings(order=2)
    for operator, size, dtype, last in itertools.product(operators, SIZES, DTYPES, (False, True)):
        n, c, h, w = size
        shape = (n, h, w, c) if last else size
        x, grad_out, filters = normal(shape, dtype), normal(shape, dtype), [normal((c, taps), dtype) for taps in TAPS[operator]]
        getattr(cuda_host, operator)(x, filters, np.empty_like(x), last)
        grads = [np.empty_like(f) for f in filters]
        getattr(cuda_host, f"{operator}_backward")(grad_out, x, filters, np.empty_like(x), grads, last)
    print("clean")


main()
