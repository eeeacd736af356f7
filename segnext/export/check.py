"""The check of a written file: its answer against the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import SegNeXt
from .program import LEAST, ExportError, fixed_bases

TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Agreement:
    """How far a file's answer is from the model's.

    Attributes:
        shape: of the images.
        error: the largest difference of a logit, over the largest logit; for labels how much a pixel's label lies below the
            highest of the upsampled logits at most, likewise.
        share: of the pixels whose label is another; None for logits.
    """

    shape: tuple[int, ...]
    error: float
    share: float | None = None

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        if self.share is None:
            return f"images {size}: largest difference from torch {self.error:.1e} of the largest logit"
        other = f"{self.share:.4%} of the labels differ from torch's"
        return f"images {size}: {other}, their logits by {self.error:.1e} of the largest logit at most"


def checked_shapes(model: SegNeXt, size: tuple[int, int], dynamic: bool) -> list[tuple[int, ...]]:
    """The shapes of the images that a file is checked on; it is traced at the first, where a dynamic batch must not be 1."""
    channels, (height, width) = model.config.in_channels, size
    if not dynamic:
        return [(1, channels, height, width)]
    return [(2, channels, height, width), (1, channels, height + 19, max(LEAST, width // 2 + 1))]


@torch.inference_mode()
def compare(run: Callable[[Tensor], Tensor], model: SegNeXt, shape: tuple[int, ...], labels: bool) -> Agreement:
    """An exported model's answer for random images against the model's own."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    bases = fixed_bases(model)
    logits = model(images, bases if bases is None else bases.expand(shape[0], -1, -1))
    found, largest = run(images), logits.abs().max()
    if not labels:
        _same_shape(found, logits)
        return Agreement(shape, ((found - logits).abs().max() / largest).item())
    upsampled = F.interpolate(logits, shape[-2:], mode="bilinear", align_corners=False)
    highest, expected = upsampled.max(1)
    _same_shape(found, expected)
    below = highest - upsampled.gather(1, found[:, None])[:, 0]
    return Agreement(shape, (below.max() / largest).item(), (found != expected).float().mean().item())


def _same_shape(found: Tensor, expected: Tensor) -> None:
    is_, ought = ([tensor.dtype, *tensor.shape] for tensor in (found, expected))
    if is_ != ought:
        raise ExportError(f"the file fails its check and was not kept: it gives {is_} instead of {ought}")
