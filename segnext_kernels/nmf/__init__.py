"""nmf: non-negative matrix factorisation by multiplicative updates, the Hamburger's core, as one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _register, _select, _validate
from . import autograd as _autograd
from . import reference as _reference


def nmf(
    x: Tensor,
    bases: Tensor,
    steps: int,
    gradient: str = "exact",
    *,
    projection: Tensor | None = None,
    round_factors: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Approximates each non-negative matrix by a product of two of rank R, found by multiplicative updates.

    ``C = softmax_R(x^T B)``, then ``steps`` times ``C <- C (x^T B) / (C B^T B + 1e-6)`` and
    ``B <- B (x C) / (B C^T C + 1e-6)`` (products and quotients of same shapes element by element); C is updated once more and
    ``y = B C^T``. With zero steps only that last update of C is done. With a projection P ``y = (P B) C^T``: the Hamburger's
    second convolution, which then meets R columns instead of N.

    Equivalent to::

        C = torch.softmax(x.mT @ B, dim=-1)
        for _ in range(steps):
            C = C * (x.mT @ B) / (C @ (B.mT @ B) + 1e-6)
            B = B * (x @ C) / (B @ (C.mT @ C) + 1e-6)
        C = C * (x.mT @ B) / (C @ (B.mT @ B) + 1e-6)
        y = (projection @ B if projection is not None else B) @ C.mT

    The factors are kept in float32 whatever x's dtype is (float64 for float64). Where a gradient is wanted, the CPU kernels
    keep the factors of every step for backward besides ``x`` and ``bases``, (2 steps + 3) N R + (2 steps + 1) D R numbers a
    matrix (with "one_step" 3 N R + D R) with R rounded up to a multiple of 16; the Triton kernels do the steps again. Under
    autocast ``x`` is cast to autocast's dtype. On NVIDIA GPUs a product with float32 ``x`` is made of three of TF32, which is
    as exact, or of one where ``torch.backends.cuda.matmul`` allows it. A NaN or infinity in a matrix makes that whole matrix of
    y non-finite (with zero steps its column) and leaves the rest of the batch alone. Export and trace under ``no_grad``, or the
    program computes what backward needs as well.

    Args:
        x: [B, D, N] >= 0 (not checked), float32, float64, bfloat16 or float16; contiguous or transposed (D fastest, as
            ``flatten(2)`` of a channels_last image gives) are used as they are, any other strides are copied to contiguous.
            Any dimension may be zero. The CPU kernels hold a copy of x in float32 (float64 for float64)
            where it is contiguous or, up to 20 MB, of 16 bits, unless they multiply bfloat16 as it is.
        bases: [B, D, R] >= 0 with R >= 1, the initial bases, in x's dtype or in float32; same device.
        steps: how often C and B are updated, >= 0. SegNeXt: 6 in training, 7 in evaluation.
        gradient: "exact" differentiates through all steps (what the official code does), "one_step" only through the last
            update of C (what the Hamburger paper proposes; the gradient for ``bases`` is then zero).
        projection: [D, D], in x's dtype or in float32 (float64 for float64), what y is multiplied with from the left, or None.
            The CPU kernels multiply the bases with it; elsewhere it is y, in y's dtype, which rounds their gradients so, too.
        round_factors: whether products with bfloat16 ``x`` may take the factors rounded to bfloat16, all but the first, whose
            result is the softmax's logits. Where CPUs multiply bfloat16, high ranks then take little more than half the time;
            in Triton on NVIDIA's GPUs one product is made instead of two or three. An element of y is off by up to four
            roundings instead of its own; the mean error grows by a twentieth for values around one, and at most doubles where
            the softmax is sharp. Without effect elsewhere, and where a gradient is wanted.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        y: like ``x`` in shape, dtype and layout.

    Raises:
        TypeError: an argument is no tensor, dtypes are mixed or unsupported, or ``steps`` is no int.
        ValueError: shapes or devices do not fit, ``steps`` is negative or above 2**20, ``gradient`` is unknown, or the named
            backend cannot serve this call.

    Source:
        "Is Attention Better Than Matrix Decomposition?" (ICLR 2021), section 2.2.2 (the one-step gradient: 2.3); ``NMF2D`` of
        the official SegNeXt code.
    """
    _validate.nmf(x, bases, steps, gradient, round_factors, projection)
    dtype = _validate.accumulator(x.dtype)
    x, bases = _validate.dense_matrix(x), bases.to(dtype).contiguous()
    projection = None if projection is None else projection.to(dtype).contiguous()
    served = _select.select("nmf", backend, x, rank=bases.shape[2])
    if served == "reference":
        return _register.run_reference(_reference.nmf, _autograd.autocast, x, bases, steps, gradient, projection)
    given = [x, bases] if projection is None else [x, bases, projection]
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if served == "cpu" and projection is not None:
        rounded = round_factors and not differentiated
        y, _ = _register.operator("nmf_projected", served)(x, bases, projection, steps, gradient, differentiated, rounded)
        return y
    if projection is not None:
        y = nmf(x, bases, steps, gradient, round_factors=round_factors and not differentiated, backend=served)
        projection = projection.to(y.dtype)
        return projection @ y if y.is_contiguous() else (y.mT @ projection.mT).mT
    if served == "cpu" and differentiated:
        y, _ = _register.operator("nmf_and_factors", served)(x, bases, steps, gradient)
        return y
    return _register.operator("nmf", served)(x, bases, steps, gradient, round_factors and not differentiated)
