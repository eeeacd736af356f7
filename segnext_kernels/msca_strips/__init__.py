"""msca_strips: the multi-scale strip convolutions of SegNeXt's attention as one operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _register, _select, _validate
from . import autograd as _autograd
from . import reference as _reference


def msca_strips(x: Tensor, weights: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Sums a depthwise 5x5 convolution and three pairs of depthwise strip convolutions of its output.

    ``a = W5 * x + b5;  y = a + sum_k (V_k * (H_k * a + bh_k) + bv_k)`` for the branch sizes k (7, 11, 21 in SegNeXt), where
    ``*`` is depthwise cross-correlation with zero padding, H_k a 1 x k row filter and V_k a k x 1 column filter.

    Equivalent to::

        w5, b5, *strips = weights
        a = F.conv2d(x, w5, b5, padding=2, groups=C)
        y = a
        for wh, bh, wv, bv in zip(strips[0::4], strips[1::4], strips[2::4], strips[3::4]):
            k = wh.shape[-1]
            y = y + F.conv2d(F.conv2d(a, wh, bh, padding=(0, k // 2), groups=C), wv, bv, padding=(k // 2, 0), groups=C)

    Only ``x`` and the filters are kept for backward. Under autocast ``x`` is cast to autocast's dtype, and the filters where
    they are not all float32. Accumulates in float32 (float64 for float64). A NaN or infinity in ``x`` reaches the outputs
    within the filters' reach and no others.

    Args:
        x: [N, C, H, W], float32, float64, bfloat16 or float16; contiguous or channels_last are used as they are, any other
            strides are copied to contiguous first. Any dimension may be zero.
        weights: 2 + 4 B tensors on x's device, of x's dtype or, beside 16 bits, all float32, in the order of the official
            module's parameters: the 5x5 filter [C, 1, 5, 5] and its bias [C], then for every branch the row filter
            [C, 1, 1, k], its bias [C], the column filter [C, 1, k, 1] and its bias [C]. Every k is odd; (7, 11, 21) has
            compiled kernels.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        y: like ``x`` in shape, dtype and layout.

    Raises:
        TypeError: an argument is no tensor, or dtypes are mixed or unsupported.
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call.

    Source:
        SegNeXt (NeurIPS 2022), figure 2 and equation 1; ``AttentionModule`` of the official code.
    """
    sizes = _validate.msca_strips(x, weights)
    x = _validate.dense_image(x)
    served = _select.select("msca_strips", backend, x, branch_sizes=sizes)
    if served == "reference":
        return _register.run_reference(_reference.msca_strips, _autograd.autocast, x, list(weights))
    return _register.operator("msca_strips", served)(x, list(weights))
