"""Schema and fake of conv_act."""

from __future__ import annotations

from .._register import register_inference
from .reference import conv_act


def _fake(x, weight, bias, kernel_size, stride, activation):
    height, width = ((n - 1) // stride + 1 for n in x.shape[2:])  # of no negative number, which ONNX would round up
    return x.new_empty(x.shape[0], height, width, bias.shape[0]).permute(0, 3, 1, 2)


register_inference(
    "conv_act(Tensor x, Tensor weight, Tensor bias, int kernel_size, int stride, str activation) -> Tensor", conv_act, _fake
)
