"""Schema, fake, autograd and autocast of nmf.

``nmf_and_factors`` is the same with what backward then need not compute again, and so is ``nmf_projected``, whose result is
multiplied with a matrix; only the CPU has them. Backward is that of factors that are not rounded, so ``round_factors`` is for
calls without gradient.
"""

from __future__ import annotations

import torch

from .. import _triton
from .._register import cast_floating, like_layout, register
from .._validate import dense_matrix


def _fake(x, bases, steps, gradient, round_factors=False):
    return torch.empty_like(dense_matrix(x))


def _fake_and_factors(x, bases, steps, gradient):
    """The factors are numbers in the kernels' own order, the rank in whole vectors (nmf_factors_size in csrc/cpu/nmf.cpp)."""
    (batch, rows, columns), rank = x.shape, (bases.shape[2] + 15) // 16 * 16
    kept = steps if gradient == "exact" else 0
    return torch.empty_like(dense_matrix(x)), bases.new_empty(batch * ((2 * kept + 3) * columns + (2 * kept + 1) * rows) * rank)


def _projected_fake(x, bases, projection, steps, gradient, keep, round_factors):
    y, factors = _fake_and_factors(x, bases, steps, gradient)
    return y, factors if keep else bases.new_empty(0)


def _backward_fake(grad_out, x, bases, factors, steps, gradient, need_x, need_bases):
    return (
        torch.empty_like(dense_matrix(x)) if need_x else x.new_empty(0),
        torch.empty_like(bases) if need_bases else bases.new_empty(0),
    )


def _projected_backward_fake(grad_out, x, bases, projection, factors, steps, gradient, need_x, need_bases, need_projection):
    grad_x, grad_bases = _backward_fake(grad_out, x, bases, factors, steps, gradient, need_x, need_bases)
    return grad_x, grad_bases, torch.empty_like(projection) if need_projection else bases.new_empty(0)


def _setup_context(ctx, inputs, output):
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    ctx.steps, ctx.gradient = inputs[len(tensors) : len(tensors) + 2]
    factors = output[1:] if isinstance(output, tuple) else ()
    ctx.mark_non_differentiable(*factors)
    ctx.set_materialize_grads(False)  # zeros as many as the factors are
    ctx.save_for_backward(*tensors, *factors)


def _backward(operators, ctx, grad_out, _=None):
    others = (None,) * (len(ctx.needs_input_grad) - 2)
    if grad_out is None:
        return None, None, *others
    x, bases, *kept = ctx.saved_tensors
    factors = kept[0] if kept else None
    need_x, need_bases = ctx.needs_input_grad[:2]
    grad_x, grad_bases = operators.nmf_backward(
        like_layout(grad_out, x), x, bases, factors, ctx.steps, ctx.gradient, need_x, need_bases
    )
    return grad_x if need_x else None, grad_bases if need_bases else None, *others


def _projected_backward(operators, ctx, grad_out, _=None):
    if grad_out is None:
        return (None,) * 7
    needed = ctx.needs_input_grad[:3]
    x, *rest = ctx.saved_tensors
    grads = operators.nmf_projected_backward(like_layout(grad_out, x), x, *rest, ctx.steps, ctx.gradient, *needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 4


def autocast(dtype, x, *args):
    return cast_floating(x, dtype), *args  # the factors stay in float32


register(
    "nmf(Tensor x, Tensor bases, int steps, str gradient, bool round_factors=False) -> Tensor",
    "nmf_backward(Tensor grad_out, Tensor x, Tensor bases, Tensor? factors, int steps, str gradient, bool need_x,"
    " bool need_bases) -> (Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast,
    triton=_triton.kernels(__package__),
)
register(
    "nmf_and_factors(Tensor x, Tensor bases, int steps, str gradient) -> (Tensor y, Tensor factors)",
    None,
    fake=_fake_and_factors,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast,
)
register(
    "nmf_projected(Tensor x, Tensor bases, Tensor projection, int steps, str gradient, bool keep, bool round_factors)"
    " -> (Tensor y, Tensor factors)",
    "nmf_projected_backward(Tensor grad_out, Tensor x, Tensor bases, Tensor projection, Tensor factors, int steps,"
    " str gradient, bool need_x, bool need_bases, bool need_projection) -> (Tensor, Tensor, Tensor)",
    fake=_projected_fake,
    backward_fake=_projected_backward_fake,
    setup_context=_setup_context,
    backward=_projected_backward,
    autocast=autocast,
)
