"""upsample_argmax: the label map of bilinearly upsampled logits as one operator."""

from __future__ import annotations

from torch import Tensor

from .. import _register, _select, _validate
from . import autograd as _autograd  # noqa: F401  registers the operator
from . import reference as _reference


def upsample_argmax(logits: Tensor, size: tuple[int, int], *, backend: str | None = None) -> Tensor:
    """The highest class at every pixel of bilinearly upsampled logits, which are never held whole.

    Equivalent to::

        labels = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)

    up to rounding, the lowest class where several are highest, any where a logit, or the difference of two beside each other,
    is nan or infinite (but a class whose logits are all -inf has no pixel). The upsampled values are computed in float32
    (float64 for float64). Has no derivative.

    Args:
        logits: [N, C, h, w], C > 0, float32, float64, bfloat16 or float16; contiguous or channels_last are used as they are,
            any other strides are copied to contiguous first.
        size: (H, W) of the label map, larger or smaller than the logits'. A program that ``torch.jit.trace`` records keeps it.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        labels: int64 [N, H, W], contiguous.

    Raises:
        TypeError: logits are no tensor, or of an unsupported dtype.
        ValueError: shapes do not fit, or the named backend cannot serve this call.

    Source:
        ``BaseDecodeHead.predict_by_feat`` and ``postprocess_result`` of mmsegmentation: resize, then argmax.
    """
    size = _validate.upsample_argmax(logits, size)
    logits = _validate.dense_image(logits.detach())
    served = _select.select("upsample_argmax", backend, logits)
    if served == "reference":
        return _reference.upsample_argmax(logits, size)
    return _register.operator("upsample_argmax", served)(logits, *size)
