"""mlp: the MLP half of a SegNeXt block and the norm that ends a stage, folded for inference, as one operator."""

from __future__ import annotations

from torch import Tensor

from .. import _inference, _validate_inference
from . import autograd as _autograd  # noqa: F401 (registers the operator)
from . import reference as _reference


def mlp(
    x: Tensor,
    fc1: Tensor,
    bias1: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    fc2: Tensor,
    bias2: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Widens, convolves depthwise, applies GELU, narrows, adds the input and may normalise the sum; for inference.

    ``y = norm(x + W2 GELU(D * (W1 x + b1) + bd) + b2)``, norm the layer norm over the channels of each pixel, or none. The
    widened activations pass through the cache and are never held.

    Equivalent to::

        y = x + F.conv2d(dwconv_gelu(F.conv2d(x, W1, bias1), depthwise, depthwise_bias), W2, bias2)
        if norm_weight is not None:
            y = F.layer_norm(y.permute(0, 2, 3, 1), (C,), norm_weight, norm_bias, eps).permute(0, 3, 1, 2)

    Args:
        x: [N, C, H, W], float32 or bfloat16; copied to channels_last where it isn't.
        fc1, fc2: :func:`segnext_kernels.pack` of W1 [hidden, C] and W2 [C, hidden], in x's dtype.
        bias1, bias2: float32 [hidden] and [C].
        depthwise, depthwise_bias: float32 [hidden, 1, 3, 3] and [hidden].
        norm_weight, norm_bias: of the layer norm, float32 [C] both, or None both.
        eps: is added to the norm's variances.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        y: like ``x`` in shape and dtype, channels_last. GELU has the accuracy that :func:`segnext_kernels.conv_act` states.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call.
        NotImplementedError: an argument needs a gradient, which plain PyTorch gives (``backend="reference"``) and no kernel.

    Source:
        SegNeXt (NeurIPS 2022), section 3.1; ``Mlp`` and the norms of ``MSCAN`` of the official code.
    """
    _validate_inference.number("mlp", "eps", eps)
    args = (x, fc1, bias1, depthwise, depthwise_bias, fc2, bias2, norm_weight, norm_bias, eps)
    return _inference.call("mlp", backend, _validate_inference.mlp, _reference.mlp, *args)
