"""scale_add: the residual update of SegNeXt's blocks (layer scale, stochastic depth, shortcut) as one operator."""

from __future__ import annotations

from torch import Tensor

from .. import _register, _select, _validate
from . import autograd as _autograd  # noqa: F401 (registers the operator)
from . import reference as _reference


def scale_add(x: Tensor, y: Tensor, scale: Tensor, keep: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Adds y to x, scaled per channel and, with ``keep``, per image.

    ``out[n, c] = x[n, c] + keep[n] scale[c] y[n, c]``

    Equivalent to::

        out = x + keep[:, None, None, None] * (scale[:, None, None] * y)

    dtypes too: the result has the one that PyTorch promotes x, y and scale to, under autocast as without it. Only ``y``,
    ``scale`` and ``keep`` are kept for backward, where the gradient of x is the one of the result. Accumulates in float32
    (float64 for float64).

    Args:
        x: [N, C, H, W], float32, float64, bfloat16 or float16; contiguous or channels_last are used as they are, any other
            strides are copied to contiguous first. Any dimension may be zero.
        y: [N, C, H, W] on x's device, in any of these dtypes but for float64, which does not mix; copied where its layout is
            not x's.
        scale: [C], likewise.
        keep: [N], any floating dtype, no gradient: in stochastic depth 0 for the images that lose y.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        out: like ``x`` in shape and layout.

    Raises:
        TypeError: an argument is no tensor, or dtypes are unsupported or mixed with float64.
        ValueError: shapes or devices do not fit, ``keep`` requires a gradient, or the named backend cannot serve this call.

    Source:
        SegNeXt (NeurIPS 2022); ``Block`` of the official code. Layer scale: CaiT (ICCV 2021), equation 4; stochastic depth:
        "Deep Networks with Stochastic Depth" (ECCV 2016).
    """
    dtype = _validate.scale_add(x, y, scale, keep)
    x = _register.cast_tensor(_validate.dense_image(x), dtype)
    y, scale = _register.like_layout(y, x), _register.cast_tensor(scale, dtype)
    keep = None if keep is None else keep.to(_validate.accumulator(dtype)).contiguous()
    served = _select.select("scale_add", backend, x)
    if served == "reference":
        return _register.like_layout(_reference.scale_add(x, y, scale, keep), x)
    return _register.operator("scale_add", served)(x, y, scale, keep)
