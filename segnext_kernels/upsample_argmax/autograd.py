"""Schema and fake of upsample_argmax; labels have no derivative."""

from __future__ import annotations

import torch

from .. import _triton
from .._register import register_inference
from .reference import upsample_argmax


def _fake(logits, height, width):
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


def _reference(logits, height, width):
    return upsample_argmax(logits, (height, width))


register_inference(
    "upsample_argmax(Tensor logits, SymInt height, SymInt width) -> Tensor", _reference, _fake, _triton.kernels(__package__)
)
