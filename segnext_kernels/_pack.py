"""Weights of matrix products in the order in which the compiled kernels read them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._validate import PACKED_DTYPES
from ._validate_inference import PANEL


def pack(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packs the weights of a linear layer or convolution in panels of 32 outputs, zero past the last.

    Args:
        weight: [outputs, inputs], or a convolution's [outputs, channels, k, k].
        dtype: float32, or bfloat16, which the processor's dot products take in pairs of inputs.

    Returns:
        float32 [panels, inputs, 32], or bfloat16 [panels, inputs / 2 rounded up, 32, 2]; a convolution's inputs are k * k
        pixels of C channels each. How many outputs of the last panel count tells the bias, and in bfloat16 an odd number
        of inputs looks like the next even one: only what does not fit otherwise is refused where it is used.

    Raises:
        TypeError: another dtype, or weight is no tensor of floating-point numbers.
        ValueError: weight has another shape.
    """
    if dtype not in PACKED_DTYPES:
        raise TypeError(f"pack: dtype must be float32 or bfloat16, got {dtype}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"pack: weight must be a tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"pack: weight must be of floating-point numbers, got {weight.dtype}")
    if weight.dim() not in (2, 4) or weight.shape[2:3] != weight.shape[3:4]:
        raise ValueError(f"pack: weight must be [outputs, inputs] or [outputs, channels, k, k], got {list(weight.shape)}")
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    step = 2 if dtype == torch.bfloat16 else 1
    outputs, inputs = weight.shape
    padded = F.pad(weight.detach().to(dtype), (0, -inputs % step, 0, -outputs % PANEL))
    panels = padded.unflatten(0, (-1, PANEL)).unflatten(2, (-1, step)).permute(0, 2, 1, 3)  # [panels, inputs, 32, step]
    return panels.flatten(2).contiguous() if step == 1 else panels.contiguous()


def unpack(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weights [outputs, inputs] that :func:`pack` packed, in float32."""
    panels = packed if packed.dim() == 4 else packed[..., None]
    return panels.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:outputs, :inputs].float()
