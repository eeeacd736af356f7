"""upsample_cross_entropy: the cross-entropy of bilinearly upsampled logits as one operator."""

from __future__ import annotations

from torch import Tensor

from .. import _register, _select, _validate
from . import autograd as _autograd  # noqa: F401  registers the operator
from . import reference as _reference


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The mean cross-entropy of bilinearly upsampled logits, which, like their gradient, are never held whole.

    ``loss = sum_p w[t_p] (log sum_c exp(z_pc) - z_p,t_p) / sum_p w[t_p]`` over the pixels p whose target t_p is not
    ``ignore_index``, z the logits at the target's size; 0 where all are ignored.

    Equivalent to::

        z = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(z, target, weight, ignore_index=ignore_index)

    but for the 0, which PyTorch makes nan, and for infinite logits, or two beside each other whose difference is infinite, of
    which the loss may be nan where PyTorch's is not (mask a class by a large negative number). Only the arguments are kept for
    backward, which computes the upsampled logits again.
    Accumulates in float32 (float64 for float64), losses in float64. Autocast leaves the arguments as they are.

    Args:
        logits: [N, C, h, w], float32, float64, bfloat16 or float16; contiguous or channels_last are used as they are, any
            other strides are copied to contiguous first.
        target: integers [N, H, W], each a class or ``ignore_index``; copied where it is not contiguous int64.
        ignore_index: the label of pixels that do not count.
        weight: of the classes, [C], the dtype of the loss; it gets no gradient.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        loss: one number, float32 (float64 for float64).

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call.
        RuntimeError: a target is neither a class nor ``ignore_index`` (from plain PyTorch: IndexError). From Triton on a GPU,
            which nobody waits for, the loss and its gradient are nan instead.

    Source:
        ``BaseDecodeHead.loss_by_feat`` of mmsegmentation: resize, then cross-entropy.
    """
    _validate.upsample_cross_entropy(logits, target, ignore_index, weight)
    logits, target = _validate.dense_image(logits), target.long().contiguous()
    weight = None if weight is None else weight.detach().contiguous()
    served = _select.select("upsample_cross_entropy", backend, logits)
    if served == "reference":
        return _reference.upsample_cross_entropy(logits, target, weight, ignore_index)
    return _register.operator("upsample_cross_entropy", served)(logits, target, weight, ignore_index)
