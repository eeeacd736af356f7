"""Schema, fake, autograd and autocast of nmf."""

from __future__ import annotations

import torch

from .. import _triton
from .._register import cast_floating, like_layout, register


def _fake(x, bases, steps, gradient):
    return torch.empty_like(x)


def _backward_fake(grad_out, x, bases, steps, gradient, need_x, need_bases):
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(bases) if need_bases else bases.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, bases, ctx.steps, ctx.gradient = inputs
    ctx.save_for_backward(x, bases)


def _backward(operators, ctx, grad_out):
    x, bases = ctx.saved_tensors
    need_x, need_bases = ctx.needs_input_grad[:2]
    grad_x, grad_bases = operators.nmf_backward(like_layout(grad_out, x), x, bases, ctx.steps, ctx.gradient, need_x, need_bases)
    return grad_x if need_x else None, grad_bases if need_bases else None, None, None


def autocast(dtype, x, bases, steps, gradient):
    return cast_floating(x, dtype), bases, steps, gradient  # the factors stay in float32


register(
    "nmf(Tensor x, Tensor bases, int steps, str gradient) -> Tensor",
    "nmf_backward(Tensor grad_out, Tensor x, Tensor bases, int steps, str gradient, bool need_x, bool need_bases)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast,
    triton=_triton.kernels(__package__),
)
