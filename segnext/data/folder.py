"""Labelled photographs in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode, functional
from tqdm import tqdm

from ..images import read_image, read_labels, visible_files
from ..palette import IGNORED


class DataError(RuntimeError):
    """A data set that is not as it should be; the message names the file."""


class Folder(Dataset):
    """Photographs with masks, all checked, decoded and resized once and kept in memory (10 000 at 180x240: 1.7 GB).

    Args:
        root: holds classes.txt, with one class a line, and for every split ``images/`` and ``masks/``. An image and its mask
            have the same name before the ending and the same size; a mask's pixel values (greyscale or palette indices) are
            line numbers of classes.txt counted from 0, or 255 where the pixel is to be ignored.
        split: "train", "val" or any other folder of that kind.
        short_side: pixels of the shorter side after resizing, which keeps the shape; None for no resizing.

    Item: (uint8 [3, H, W], uint8 labels [H, W]).

    Raises:
        DataError: missing folders and files, unpaired files, sizes that differ, labels without a class.
        ImageError: files that are no images.
    """

    def __init__(self, root: str | Path, split: str, short_side: int | None = None) -> None:
        root = Path(root)
        self.classes = read_classes(root / "classes.txt")
        pairs = _pairs(root / split)
        self.names = list(pairs)
        bar = tqdm(pairs.values(), desc=f"reading {split}", unit="photo", leave=False, disable=None)
        self.items = [_read_pair(image, mask, self.classes, short_side) for image, mask in bar]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


def read_classes(path: Path) -> list[str]:
    """The class names in a file of one a line; blank lines at the end are left out."""
    try:
        classes = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it names the classes, one a line") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None
    if not 1 <= len(classes) <= IGNORED:
        raise DataError(f"{path}: there must be 1 to {IGNORED} classes, one a line; this file names {len(classes)}")
    return classes


def _pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    images, masks = (_by_stem(folder / kind) for kind in ("images", "masks"))
    for unpaired, kind in ((images.keys() - masks.keys(), "mask"), (masks.keys() - images.keys(), "image")):
        if unpaired:
            first = ", ".join(sorted(unpaired)[:5]) + (" ..." if len(unpaired) > 5 else "")
            raise DataError(f"{folder}: {len(unpaired)} without {'an' if kind == 'image' else 'a'} {kind}: {first}")
    if not images:
        raise DataError(f"{folder / 'images'}: there are no images in this folder")
    return {stem: (images[stem], masks[stem]) for stem in sorted(images)}


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    for path in visible_files(folder):
        if path.stem in files:
            raise DataError(f"{path} and {files[path.stem].name}: two files of the same name before the ending")
        files[path.stem] = path
    return files


def _read_pair(image_path: Path, mask_path: Path, classes: list[str], short_side: int | None) -> tuple[Tensor, Tensor]:
    image, labels = read_image(image_path), read_labels(mask_path)
    if image.shape[1:] != labels.shape:
        raise DataError(f"{mask_path}: the mask is {_size(labels)} pixels, its image {_size(image)}")
    known = labels[labels != IGNORED]
    wrong = known[(known < 0) | (known >= len(classes))]
    if wrong.numel():
        raise DataError(
            f"{mask_path}: label {wrong[0].item()} has no class; there are {len(classes)} (0 to {len(classes) - 1}, or"
            f" {IGNORED} for ignored pixels)"
        )
    labels = labels.to(torch.uint8)
    if short_side is not None:
        size = [max(1, round(n * short_side / min(labels.shape))) for n in labels.shape]
        image = functional.resize(image, size, antialias=True)
        labels = functional.resize(labels[None], size, InterpolationMode.NEAREST_EXACT)[0]
    return image, labels


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-2]}x{picture.shape[-1]}"
