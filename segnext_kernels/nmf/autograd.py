"""Schema, fake, autograd and autocast of nmf."""

from __future__ import annotations

import torch

from .. import _triton
from .._register import cast_floating, like_layout, register


def _fake(x, bases, steps, gradient, keep):
    return torch.empty_like(x), bases.new_empty(_kept(x, bases, steps, gradient) if keep else 0)


def _kept(x, bases, steps, gradient):
    """Numbers that the CPU kernels keep for backward, the rank in whole vectors (nmf_factors_size in csrc/cpu/nmf.cpp)."""
    batch, rows, columns = x.shape
    steps = steps if gradient == "exact" else 0
    return batch * ((2 * steps + 3) * columns + (2 * steps + 1) * rows) * ((bases.shape[2] + 15) // 16 * 16)


def _backward_fake(grad_out, x, bases, factors, steps, gradient, need_x, need_bases):
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(bases) if need_bases else bases.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, bases, ctx.steps, ctx.gradient, keep = inputs
    _, factors = output
    ctx.mark_non_differentiable(factors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bases, *([factors] if keep else []))


def _backward(operators, ctx, grad_out, _):
    x, bases, *kept = ctx.saved_tensors
    if grad_out is None:
        return None, None, None, None, None
    factors = kept[0] if kept else bases.new_empty(0)
    need_x, need_bases = ctx.needs_input_grad[:2]
    grad_x, grad_bases = operators.nmf_backward(
        like_layout(grad_out, x), x, bases, factors, ctx.steps, ctx.gradient, need_x, need_bases
    )
    return grad_x if need_x else None, grad_bases if need_bases else None, None, None, None


def autocast(dtype, x, bases, *rest):
    return cast_floating(x, dtype), bases, *rest  # the factors stay in float32


register(
    "nmf(Tensor x, Tensor bases, int steps, str gradient, bool keep) -> (Tensor y, Tensor factors)",
    "nmf_backward(Tensor grad_out, Tensor x, Tensor bases, Tensor factors, int steps, str gradient, bool need_x,"
    " bool need_bases) -> (Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast,
    triton=_triton.kernels(__package__),
    triton_fake=lambda x, bases, *_: (torch.empty_like(x), bases.new_empty(0)),
)
