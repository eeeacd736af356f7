"""dwconv_gelu: the 3x3 depthwise convolution and GELU in the middle of SegNeXt's MLP as one operator."""

from __future__ import annotations

from torch import Tensor

from .. import _register, _select, _validate
from . import autograd as _autograd
from . import reference as _reference


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Applies a 3x3 depthwise convolution with zero padding, adds the bias and applies GELU.

    ``y = z Phi(z)`` with ``z = W * x + b`` and Phi the normal distribution function (the erf form of GELU).

    Equivalent to::

        y = F.gelu(F.conv2d(x, weight, bias, padding=1, groups=C))

    Only ``x``, ``weight`` and ``bias`` are kept for backward. Under autocast ``x`` is cast to autocast's dtype, and ``weight``
    and ``bias`` where they are not both float32. Accumulates in float32 (float64 for float64). Where z is infinite, a
    kernel may take for GELU's slope its limit, 0 or 1, where PyTorch's is nan.

    Args:
        x: [N, C, H, W], float32, float64, bfloat16 or float16; contiguous or channels_last are used as they are, any other
            strides are copied to contiguous first. Any dimension may be zero.
        weight: [C, 1, 3, 3], on x's device, of x's dtype or, beside 16 bits, float32.
        bias: [C], as weight.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        y: like ``x`` in shape, dtype and layout.

    Raises:
        TypeError: an argument is no tensor, or dtypes are mixed or unsupported.
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call.

    Source:
        SegNeXt (NeurIPS 2022), section 3.1; ``Mlp`` and ``DWConv`` of the official code.
    """
    _validate.dwconv_gelu(x, weight, bias)
    x = _validate.dense_image(x)
    served = _select.select("dwconv_gelu", backend, x)
    if served == "reference":
        return _register.run_reference(_reference.dwconv_gelu, _autograd.autocast, x, weight, bias)
    return _register.operator("dwconv_gelu", served)(x, weight, bias)
