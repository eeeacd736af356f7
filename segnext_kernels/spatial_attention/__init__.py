"""spatial_attention: the attention half of a SegNeXt block, folded for inference, as one operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _inference, _validate_inference
from . import autograd as _autograd  # noqa: F401 (registers the operator)
from . import reference as _reference


def spatial_attention(x: Tensor, weights: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Projects, attends with MSCA, projects again and adds the scaled input; for inference.

    ``u = GELU(W1 x + b1)``; ``y = scale x + W2 ((W3 msca_strips(u) + b3) u) + b2``.

    Equivalent to::

        u = F.gelu(F.conv2d(x, W1, b1))
        y = scale[:, None, None] * x + F.conv2d(F.conv2d(msca_strips(u, strips), W3, b3) * u, W2, b2)

    Args:
        x: [N, C, H, W], float32 or bfloat16; copied to channels_last where it isn't.
        weights: W1, b1, the 14 tensors of :func:`segnext_kernels.msca_strips`, W3, b3, W2, b2, scale. The matrices [C, C] are
            packed with :func:`segnext_kernels.pack` and of x's dtype; strips are of x's dtype or all float32, biases and scale
            float32 [C].
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        y: like ``x`` in shape and dtype, channels_last. GELU has the accuracy that :func:`segnext_kernels.conv_act` states.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call.
        NotImplementedError: an argument needs a gradient, which plain PyTorch gives (``backend="reference"``) and no kernel.

    Source:
        SegNeXt (NeurIPS 2022), figure 2 and equations 1 and 2; ``SpatialAttention`` of the official code.
    """
    args = (x, weights)
    return _inference.call(
        "spatial_attention", backend, _validate_inference.spatial_attention, _reference.spatial_attention, *args
    )
