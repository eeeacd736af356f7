"""Schema and fake of upsample_argmax; labels have no derivative."""

from __future__ import annotations

import torch

from .. import _triton
from .._register import register_inference


def _fake(logits, height, width):
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


register_inference("upsample_argmax(Tensor logits, SymInt height, SymInt width) -> Tensor", _fake, _triton.kernels(__package__))
