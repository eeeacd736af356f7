"""hamburger: the matrix decomposition of SegNeXt's head between its two convolutions, as one operator."""

from __future__ import annotations

from torch import Tensor

from .. import _inference, _validate_inference
from .._validate import check_updates
from . import autograd as _autograd  # noqa: F401 (registers the operator)
from . import reference as _reference


def hamburger(
    x: Tensor,
    ham_in: Tensor,
    bias: Tensor,
    bases: Tensor,
    steps: int,
    ham_out: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    round_factors: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Decomposes features between two 1x1 convolutions, the second one with group norm and shortcut; for inference.

    ``y = relu(x + GN(W_out nmf(relu(W_in x + b))))``. What nmf gives is a product of two matrices of rank R, ``B C^T``, so
    ``(W_out B) C^T`` is computed, which multiplies W_out with R columns instead of with all pixels.

    Equivalent to::

        v = F.relu(F.conv2d(x, W_in, bias))
        z = F.conv2d(nmf(v.flatten(2), bases, steps).view(x.shape), W_out)
        y = F.relu(x + F.group_norm(z, groups, norm_weight, norm_bias, eps))

    Args:
        x: [N, C, H, W], float32 or bfloat16; copied to channels_last where it isn't.
        ham_in: :func:`segnext_kernels.pack` of W_in [C, C], in x's dtype.
        bias: float32 [C].
        bases: [N, C, R] >= 0 with R >= 1, the initial bases, in x's dtype or in float32.
        steps: see :func:`segnext_kernels.nmf`.
        ham_out: W_out, float32 [C, C], not packed.
        norm_weight, norm_bias: float32 [C].
        groups: divides C.
        round_factors: see :func:`segnext_kernels.nmf`.
        backend: ``None`` for the best that serves the call, or a name (see :func:`segnext_kernels.explain`).

    Returns:
        y: like ``x`` in shape and dtype, channels_last.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call.
        NotImplementedError: an argument needs a gradient, which plain PyTorch gives (``backend="reference"``) and no kernel.

    Source:
        "Is Attention Better Than Matrix Decomposition?" (ICLR 2021), figure 2; ``Hamburger`` of the official code.
    """
    check_updates("hamburger", steps, round_factors)  # before the kernel is called, which would accept others
    _validate_inference.check_groups("hamburger", groups, eps)
    args = (x, ham_in, bias, bases, steps, ham_out, norm_weight, norm_bias, groups, eps, round_factors)
    return _inference.call("hamburger", backend, _validate_inference.hamburger, _reference.hamburger, *args)
