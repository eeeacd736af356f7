"""Schema, fake, autograd and autocast of msca_strips."""

from __future__ import annotations

import torch

from .. import _triton
from .._register import cast_filters, cast_floating, gradient_of, is_batch_of_gradients, like_layout, register
from .._validate import dense_image, transformed
from . import reference


def _fake(x, weights):
    return torch.empty_like(dense_image(x))


def _backward_fake(grad_out, x, weights, need_x, need_weights):
    grad_x = torch.empty_like(dense_image(x)) if need_x else x.new_empty(0)
    return grad_x, [gradient_of(w) for w in weights] if need_weights else []


def _setup_context(ctx, inputs, output):
    x, weights = inputs
    ctx.save_for_backward(x, *weights)


def _backward(operators, ctx, grad_out):
    x, *weights = ctx.saved_tensors
    need_x, need_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
    if transformed() or is_batch_of_gradients(grad_out):  # torch cannot map an operator that returns a list
        return torch.func.vjp(reference.msca_strips, x, weights)[1](grad_out)
    grad_x, grad_weights = operators.msca_strips_backward(like_layout(grad_out, x), x, weights, need_x, need_weights)
    return grad_x if need_x else None, grad_weights if need_weights else [None] * len(weights)


def autocast(dtype, x, weights):
    return cast_floating(x, dtype), cast_filters(weights, dtype)


register(
    "msca_strips(Tensor x, Tensor[] weights) -> Tensor",
    "msca_strips_backward(Tensor grad_out, Tensor x, Tensor[] weights, bool need_x, bool need_weights) -> (Tensor, Tensor[])",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast,
    triton=_triton.kernels(__package__),
)
