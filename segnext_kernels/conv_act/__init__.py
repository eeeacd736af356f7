"""conv_act: convolution, bias and activation of a fused model as one operator."""

from __future__ import annotations

from torch import Tensor

from .. import _inference, _validate_inference
from .._validate import whole
from . import autograd as _autograd  # noqa: F401 (registers the operator)
from . import reference as _reference


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: int = 1,
    stride: int = 1,
    activation: str = "none",
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolves with packed weights, adds the bias and applies an activation; for inference.

    ``y = activation(W * x + b)`` with zero padding of half the kernel.

    Equivalent to::

        y = F.gelu(F.conv2d(x, W, bias, stride, padding=kernel_size // 2))  # weight = pack(W, x.dtype), activation "gelu"

    Args:
        x: [N, C, H, W], float32 or bfloat16, in either layout.
        weight: :func:`segnext_kernels.pack` of [outputs, C, kernel_size, kernel_size], in x's dtype.
        bias: float32 [outputs].
        kernel_size: odd.
        stride: at least 1.
        activation: "none", "gelu" (the erf form) or "relu". GELU's error is at most 7e-7 (bfloat16: 2.1e-4), or beyond 1 such a
            part of the value that it is taken of: of -1e6 it is not 0 but that small.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        y: [N, outputs, H / stride rounded up, W / stride rounded up], x's dtype, channels_last.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call.
        NotImplementedError: an argument needs a gradient, which plain PyTorch gives (``backend="reference"``) and no kernel.

    Source:
        SegNeXt (NeurIPS 2022), section 3.1: its stem, downsampling and projections, batch norms folded.
    """
    for name, number in (
        ("kernel_size", kernel_size),
        ("stride", stride),
    ):  # the kernel would accept a bool
        whole("conv_act", name, number)
    args = (x, weight, bias, kernel_size, stride, activation)
    return _inference.call("conv_act", backend, _validate_inference.conv_act, _reference.conv_act, *args)
