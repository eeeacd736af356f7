"""Schema, fake and autograd of scale_add; x and scale have the result's dtype, keep the accumulator's. Autocast
casts nothing: PyTorch's multiplication and addition promote there as elsewhere."""

from __future__ import annotations

import torch

from .. import _triton
from .._register import gradient_of, like_layout, register
from .._validate import dense_image


def _fake(x, y, scale, keep):
    return torch.empty_like(dense_image(x))


def _backward_fake(grad_out, y, scale, keep, need_y, need_scale):
    grad_y = torch.empty_like(dense_image(y)) if need_y else y.new_empty(0)
    return grad_y, gradient_of(scale) if need_scale else scale.new_empty(0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(operators, ctx, grad_out):
    y, scale, keep = ctx.saved_tensors
    _, need_y, need_scale, _ = ctx.needs_input_grad
    grad_out, grads = like_layout(grad_out, y), (None, None)
    if need_y or need_scale:
        grads = operators.scale_add_backward(grad_out, y, scale, keep, need_y, need_scale)
    return grad_out, grads[0] if need_y else None, grads[1] if need_scale else None, None


register(
    "scale_add(Tensor x, Tensor y, Tensor scale, Tensor? keep) -> Tensor",
    "scale_add_backward(Tensor grad_out, Tensor y, Tensor scale, Tensor? keep, bool need_y, bool need_scale)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton=_triton.kernels(__package__),
)
