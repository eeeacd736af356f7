"""resize_concat_conv: maps of several sizes, resized, concatenated and convolved, as one operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _inference, _validate_inference
from . import autograd as _autograd  # noqa: F401 (registers the operator)
from . import reference as _reference


def resize_concat_conv(
    maps: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor, *, backend: str | None = None
) -> Tensor:
    """Resizes maps bilinearly to the first one's size, concatenates them and applies a 1x1 convolution; for inference.

    ``y = sum over i of resize(W_i maps_i) + b``: a 1x1 convolution and resizing commute, so that each map is convolved at its
    own size and no concatenation is held.

    Equivalent to::

        first, *others = maps
        resized = [F.interpolate(x, first.shape[2:], mode="bilinear", align_corners=False) for x in others]
        y = F.conv2d(torch.cat([first, *resized], dim=1), torch.cat(W, dim=1), bias)  # weights[i] = pack(W[i], x.dtype)

    Args:
        maps: [N, C_i, H_i, W_i] each, float32 or bfloat16; copied to channels_last where they aren't; each with channels and
            pixels.
        weights: for each map :func:`segnext_kernels.pack` of W_i [outputs, C_i], in the maps' dtype.
        bias: float32 [outputs].
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        y: [N, outputs, H_0, W_0], the maps' dtype, channels_last.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call.
        NotImplementedError: an argument needs a gradient, which plain PyTorch gives (``backend="reference"``) and no kernel.

    Source:
        SegNeXt (NeurIPS 2022), section 3.2; ``LightHamHead`` of the official code.
    """
    args = (maps, weights, bias)
    return _inference.call(
        "resize_concat_conv", backend, _validate_inference.resize_concat_conv, _reference.resize_concat_conv, *args
    )
