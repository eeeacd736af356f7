"""group_norm_relu: group norm, residual and ReLU of the decode heads as one operator."""

from __future__ import annotations

from torch import Tensor

from .. import _inference, _validate_inference
from . import autograd as _autograd  # noqa: F401 (registers the operator)
from . import reference as _reference


def group_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalises groups of channels, adds a residual and applies ReLU; for inference.

    ``y = relu(residual + weight (x - mean) / sqrt(var + eps) + bias)``, mean and variance of each image's groups of channels.

    Equivalent to::

        y = F.relu(F.group_norm(x, groups, weight, bias, eps) + residual)

    Args:
        x: [N, C, H, W], float32 or bfloat16; copied to channels_last where it isn't.
        weight, bias: float32 [C].
        groups: divides C.
        residual: like x, or None.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        y: like ``x`` in shape and dtype, channels_last.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call.
        NotImplementedError: an argument needs a gradient, which plain PyTorch gives (``backend="reference"``) and no kernel.

    Source:
        "Group Normalization" (ECCV 2018); ``LightHamHead`` of the official code.
    """
    _validate_inference.check_groups("group_norm_relu", groups, eps)
    args = (x, weight, bias, groups, eps, residual)
    return _inference.call("group_norm_relu", backend, _validate_inference.group_norm_relu, _reference.group_norm_relu, *args)
