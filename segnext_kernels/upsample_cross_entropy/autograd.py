"""Schema, fake and autograd of upsample_cross_entropy; under autocast too logits are taken as they are."""

from __future__ import annotations

import torch

from .. import _triton
from .._register import register
from .._validate import accumulator, dense_image


def _fake(logits, target, weight, ignore_index):
    return logits.new_empty((), dtype=accumulator(logits.dtype))


def _backward_fake(grad_out, logits, target, weight, ignore_index):
    return torch.empty_like(dense_image(logits))


def _setup_context(ctx, inputs, output):
    logits, target, weight, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, weight)


def _backward(operators, ctx, grad_out):
    grad = operators.upsample_cross_entropy_backward(grad_out, *ctx.saved_tensors, ctx.ignore_index)
    return grad, None, None, None


register(
    "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index) -> Tensor",
    "upsample_cross_entropy_backward(Tensor grad_out, Tensor logits, Tensor target, Tensor? weight, int ignore_index)"
    " -> Tensor",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton=_triton.kernels(__package__),
)
