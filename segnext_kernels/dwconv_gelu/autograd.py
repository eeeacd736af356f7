"""Schema, fake, autograd and autocast of dwconv_gelu."""

from __future__ import annotations

import torch

from .. import _triton
from .._register import cast_filters, cast_floating, gradient_of, like_layout, register
from .._validate import dense_image


def _fake(x, weight, bias):
    return torch.empty_like(dense_image(x))


def _backward_fake(grad_out, x, weight, bias, need_x, need_weights):
    grad_x = torch.empty_like(dense_image(x)) if need_x else x.new_empty(0)
    if not need_weights:
        return grad_x, x.new_empty(0), x.new_empty(0)
    return grad_x, gradient_of(weight), gradient_of(bias)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(operators, ctx, grad_out):
    x, weight, bias = ctx.saved_tensors
    need_x, need_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
    grads = operators.dwconv_gelu_backward(like_layout(grad_out, x), x, weight, bias, need_x, need_weights)
    return tuple(grad if need else None for grad, need in zip(grads, (need_x, need_weights, need_weights), strict=True))


def autocast(dtype, x, weight, bias):
    return cast_floating(x, dtype), *cast_filters((weight, bias), dtype)


register(
    "dwconv_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    "dwconv_gelu_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, bool need_x, bool need_weights)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast,
    triton=_triton.kernels(__package__),
)
