"""Labelled pictures: in files, read when they are asked for, or all read once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode, functional
from tqdm import tqdm

from ..errors import SegnextError
from ..images import read_image
from ..palette import Colour


class DataError(SegnextError, RuntimeError):
    """A data set that is not as it should be; the message names the file."""


class MissingError(DataError):
    """A data set, or a split of it, that is not there at all."""


class Pairs(Dataset):
    """Images and masks in files, read when they are asked for.

    Args:
        classes, palette: the classes' names and colours.
        files: image and mask of every item. A mask that is no file by itself is an object whose ``str()`` names it.
        read_mask: what makes labels uint8 [H, W] of a mask, each below ``len(classes)`` or 255 where it is to be ignored; it
            gets a string where ``files`` has a path. A function of a module, so that worker processes can be sent it.
        faults: a sentence for each file that is in no pair but should be; :func:`open_dataset` raises the first.

    Item: (uint8 [3, H, W], uint8 labels [H, W]).

    Raises (when an item is read):
        DataError: sizes that differ, labels without a class.
        ImageError: files that are no images.
    """

    def __init__(
        self,
        classes: Sequence[str],
        palette: Sequence[Colour],
        files: Sequence[tuple[str | Path, Any]],
        read_mask: Callable[[Any], Tensor],
        faults: Sequence[str] = (),
    ) -> None:
        self.classes, self.palette = list(classes), list(palette)
        # Strings, because a worker process is sent 100 000 of them in a tenth of a second, and as many paths in two.
        self.files = [(str(image), str(mask) if isinstance(mask, Path) else mask) for image, mask in files]
        self.read_mask, self.faults = read_mask, list(faults)

    @property
    def names(self) -> list[str]:
        """A name for every pair that no other has: the image's without its ending, if need be with its folder's before it."""
        images = [Path(image) for image, _ in self.files]
        stems = [image.stem for image in images]
        return stems if len(set(stems)) == len(stems) else [f"{image.parent.name}/{image.stem}" for image in images]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_file, mask_file = self.files[index]
        image, labels = read_image(image_file), self.read_mask(mask_file)
        require_same_size(image, labels, mask_file)
        return image, labels


class Memory(Dataset):
    """The items of other data, all read, checked and resized once and kept in memory (10 000 at 180x240: 1.7 GB).

    Args:
        pairs: the other data.
        short_side: pixels of the shorter side after resizing, which keeps the shape; None for no resizing.

    Item: (uint8 [3, H, W], uint8 labels [H, W]).

    Raises:
        DataError, ImageError: as reading the items of ``pairs`` does.
    """

    def __init__(self, pairs: Pairs, short_side: int | None = None) -> None:
        self.classes, self.palette, self.names = pairs.classes, pairs.palette, pairs.names
        bar = tqdm(range(len(pairs)), desc="reading", unit="photo", leave=False, disable=None)
        self.items = [pairs[i] if short_side is None else _resized(*pairs[i], short_side) for i in bar]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


def require_same_size(image: Tensor, labels: Tensor, mask_file: Any) -> None:
    """Raises a DataError where an image [3, H, W] and its labels [H, W] differ in size."""
    if image.shape[1:] != labels.shape:
        turned = tuple(image.shape[:0:-1]) == tuple(labels.shape)
        hint = "; cameras note in EXIF that an image is to be turned, and it is, but a mask without that note is not"
        raise DataError(f"{mask_file}: the mask is {_size(labels)} pixels, its image {_size(image)}{hint if turned else ''}")


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-2]}x{picture.shape[-1]}"


def _resized(image: Tensor, labels: Tensor, short_side: int) -> tuple[Tensor, Tensor]:
    size = [max(1, round(n * short_side / min(labels.shape))) for n in labels.shape]
    image = functional.resize(image, size, antialias=True)
    return image, functional.resize(labels[None], size, InterpolationMode.NEAREST_EXACT)[0]
