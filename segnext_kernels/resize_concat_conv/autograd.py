"""Schema and fake of resize_concat_conv."""

from __future__ import annotations

from .._register import register_inference
from .reference import resize_concat_conv


def _fake(maps, weights, bias):
    images, _, height, width = maps[0].shape
    return maps[0].new_empty(images, height, width, bias.shape[0]).permute(0, 3, 1, 2)


register_inference("resize_concat_conv(Tensor[] maps, Tensor[] weights, Tensor bias) -> Tensor", resize_concat_conv, _fake)
