"""What a picture and its labels go through before they are trained on."""

from __future__ import annotations

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ..model import MEAN
from ..palette import IGNORED

TRIES = 10
FILL = tuple(round(255 * value) for value in MEAN)  # zero once it is normalised


class RandomScaleCrop(v2.Transform):
    """A crop of the picture at a random scale; of pictures that are smaller then, all that there is.

    Only the part of the picture that is seen is resized, which for large pictures costs a fraction of resizing them whole.

    Args:
        crop: (height, width) of the result, at most.
        scale: (long, short) sides that the picture, resized, just fits into.
        ratio: that size is multiplied by a random number between these.
        max_share: of the labelled pixels in a crop that may belong to one class, or another crop is tried.

    Source: ``RandomResize`` and ``RandomCrop`` of mmsegmentation.
    """

    def __init__(
        self, crop: tuple[int, int], scale: tuple[int, int], ratio: tuple[float, float] = (0.5, 2.0), max_share: float = 0.75
    ) -> None:
        super().__init__()
        self.crop, self.scale, self.ratio, self.max_share = crop, scale, ratio, max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        labels = next((item for item in flat_inputs if isinstance(item, tv_tensors.Mask)), None)
        height, width = v2.query_size(flat_inputs)
        factor = fit_factor((height, width), self.scale) * torch.empty(()).uniform_(*self.ratio).item()
        resized = [max(1, round(side * factor)) for side in (height, width)]
        seen = [min(side, crop) for side, crop in zip(resized, self.crop, strict=True)]  # the part that is no filling
        for _ in range(TRIES):
            top, left = (int(torch.randint(full - part + 1, ())) for full, part in zip(resized, seen, strict=True))
            box = (*_source(top, seen[0], resized[0], height), *_source(left, seen[1], resized[1], width))
            if labels is None or self.max_share >= 1 or self._is_mixed(labels, *box):
                break
        top, bottom, left, right = box
        return {"box": (top, left, bottom - top, right - left), "seen": seen}

    def _is_mixed(self, labels: torch.Tensor, top: int, bottom: int, left: int, right: int) -> bool:
        counts = torch.bincount(labels[..., top:bottom, left:right].flatten().int(), minlength=IGNORED + 1)[:IGNORED]
        return int((counts > 0).sum()) > 1 and counts.max() < self.max_share * counts.sum()

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # Masks go as pictures of one channel: torchvision's own nearest would move them by half a pixel against the picture.
        is_mask = isinstance(inpt, tv_tensors.Mask)
        part = functional.crop(inpt, *params["box"]).as_subclass(torch.Tensor)
        part = part[None] if is_mask else part
        how = v2.InterpolationMode.NEAREST_EXACT if is_mask else v2.InterpolationMode.BILINEAR
        part = functional.resize(part, params["seen"], how, antialias=True)
        return tv_tensors.wrap(part[0] if is_mask else part, like=inpt)


class FillUp(v2.Transform):
    """Makes pictures as large as ``size`` (height, width) on the right and below, labels with 255.

    Source: mmsegmentation's ``SegDataPreProcessor``, which does it last, so that the filling is zero for the network.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        below, beside = (whole - seen for whole, seen in zip(self.size, inpt.shape[-2:], strict=True))
        if not below and not beside:
            return inpt
        fill = IGNORED if isinstance(inpt, tv_tensors.Mask) else list(FILL)
        return functional.pad(inpt, [0, 0, beside, below], fill=fill)


def fit_factor(size: tuple[int, int], scale: tuple[int, int]) -> float:
    """What both sides of a picture are multiplied by to just fit into ``scale`` = (long, short) sides."""
    return min(max(scale) / max(size), min(scale) / min(size))


def _source(start: int, length: int, resized: int, size: int) -> tuple[int, int]:
    """The pixels start..end of a side of ``size`` that ``length`` pixels from ``start`` on show once it is ``resized``."""
    begin = min(int(start * size / resized), size - 1)
    return begin, min(size, max(begin + 1, round((start + length) * size / resized)))


def photometric_distortion() -> v2.Transform:
    """Brightness, contrast, saturation and hue, each changed in half of the pictures.

    Source: ``PhotoMetricDistortion`` of mmsegmentation; there, brightness is added (up to 32 of 255 levels), not multiplied,
        contrast multiplies the values themselves, not their distance from the mean grey, and saturation is that of HSV.
    """
    changes = {"brightness": 0.25, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    return v2.Compose([v2.RandomApply([v2.ColorJitter(**{name: amount})]) for name, amount in changes.items()])


def augmentation(
    crop: tuple[int, int],
    scale: tuple[int, int],
    ratio: tuple[float, float] = (0.5, 2.0),
    max_share: float = 0.75,
    distort: bool = True,
) -> v2.Transform:
    """The paper's: :class:`RandomScaleCrop`, flip, :func:`photometric_distortion`, and filled up to the size of the crop."""
    steps = [RandomScaleCrop(crop, scale, ratio, max_share), v2.RandomHorizontalFlip()]
    return v2.Compose([*steps, *([photometric_distortion()] if distort else []), FillUp(crop)])
