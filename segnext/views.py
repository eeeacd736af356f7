"""How a model is shown a picture in evaluation: at which sizes, mirrored or not, whole or through a sliding window."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from segnext_kernels import upsample_argmax

from .data.augment import fit_factor
from .images import normalise
from .windows import windows

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class View:
    """A way of looking at pictures.

    Attributes:
        scale: (long, short) sides that the picture, resized, just fits into; None for its own size.
        multiple: both sides are rounded up to a multiple of this.
        window, stride: (height, width) of a sliding window and between windows; None for the picture as a whole.
        ratios: the picture is looked at in the size of ``scale`` times each of these.
        flip: and mirrored as well.

    Source: mmsegmentation's ``slide_inference`` and ``MultiScaleFlipAug``; ``AlignResize`` of the official code.
    """

    scale: tuple[int, int] | None = None
    multiple: int = 1
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False

    def size(self, size: tuple[int, int], ratio: float = 1.0) -> tuple[int, int]:
        """What (height, width) a picture of that size is resized to."""
        factor = ratio * (1.0 if self.scale is None else fit_factor(size, self.scale))
        return tuple(self.multiple * math.ceil(max(1, int(side * factor + 0.5)) / self.multiple) for side in size)


@torch.inference_mode()
def label_map(model: nn.Module, image: Tensor, view: View) -> Tensor:
    """The label of every pixel.

    Args:
        model: in eval mode; takes normalised images [1, 3, H, W] and gives logits [1, C, h, w].
        image: uint8 [3, H, W], on any device; it is moved to the model's.

    Returns:
        Labels int64 [H, W]. With several ratios or ``flip``, the class with the largest mean probability.
    """
    size = tuple(image.shape[-2:])
    image = image[None].to(next(model.parameters()).device)
    if len(view.ratios) == 1 and not view.flip:
        return upsample_argmax(_logits(model, image, view, view.ratios[0]), size)[0]
    total = None
    for probabilities in _probabilities(model, image, view):
        total = probabilities if total is None else total.add_(probabilities)
    return total.argmax(1)[0]


def _probabilities(model: nn.Module, image: Tensor, view: View) -> Iterator[Tensor]:
    """Of the classes at the picture's size [1, C, H, W], for each ratio, and mirrored; in place, for they are large."""
    for ratio in view.ratios:
        for flip in (False, True) if view.flip else (False,):
            logits = _logits(model, image.flip(3) if flip else image, view, ratio)
            full = F.interpolate(logits.float(), image.shape[-2:], mode="bilinear")
            full.sub_(full.amax(1, keepdim=True)).exp_()
            full.div_(full.sum(1, keepdim=True))
            yield full.flip(3) if flip else full


def _logits(model: nn.Module, image: Tensor, view: View, ratio: float) -> Tensor:
    """Logits of the resized picture [1, C, h, w], at the model's stride or, of windows, at every pixel."""
    size = view.size(tuple(image.shape[-2:]), ratio)
    image = resized(image, size)
    if view.window is None or (view.window[0] >= size[0] and view.window[1] >= size[1]):
        return model(image)
    logits, count = None, image.new_zeros(1, 1, *size)
    for rows in windows(size[0], view.window[0], view.stride[0]):
        for columns in windows(size[1], view.window[1], view.stride[1]):
            part = image[:, :, rows, columns].contiguous(memory_format=torch.channels_last)
            part = F.interpolate(model(part).float(), part.shape[-2:], mode="bilinear")
            if logits is None:
                logits = part.new_zeros(1, part.shape[1], *size)
            logits[:, :, rows, columns] += part
            count[:, :, rows, columns] += 1
    return logits / count


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """What a model takes: uint8 [B, 3, H, W] at that (height, width), normalised, channels_last."""
    if size != tuple(images.shape[-2:]):
        images = functional.resize(images, list(size), antialias=True)
    return normalise(images).contiguous(memory_format=torch.channels_last)
