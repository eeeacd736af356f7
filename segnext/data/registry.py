"""The data sets that can be opened by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .ade20k import ade20k
from .cityscapes import cityscapes
from .coco_stuff import coco_stuff
from .coco_voc import coco_voc
from .folder import folder
from .isaid import isaid
from .pairs import DataError, Pairs
from .pascal_context import pascal_context_59, pascal_context_60
from .pascal_voc import pascal_voc


class Kind(NamedTuple):
    """A data set: what finds a split's files, the number of classes (None: not the same everywhere), the splits it can have.

    The function's docstring tells the files that it expects. What it returns may have ``faults``.
    """

    find: Callable[[Path, str], Pairs]
    classes: int | None
    splits: tuple[str, ...] = ("train", "val")


DATASETS = {
    "folder": Kind(folder, None, ("train", "val", "test")),
    "ade20k": Kind(ade20k, 150),
    "cityscapes": Kind(cityscapes, 19, ("train", "val", "test")),
    "coco-stuff": Kind(coco_stuff, 171),
    "pascal-voc": Kind(pascal_voc, 21, ("train", "val", "trainval", "trainaug")),
    "coco-voc": Kind(coco_voc, 21),
    "pascal-context-59": Kind(pascal_context_59, 59),
    "pascal-context-60": Kind(pascal_context_60, 60),
    "isaid": Kind(isaid, 16),
}


def open_dataset(name: str, root: str | Path, split: str) -> Pairs:
    """A split of a data set, to train or evaluate on.

    Args:
        name: one of ``DATASETS``.
        root: its folder; ``segnext data list`` tells what must be in it.
        split: "train", "val" and what else ``splits(name)`` has.

    Raises:
        DataError: an unknown name, missing folders and files, images without mask and masks without image.
    """
    pairs = kind(name).find(Path(root), split)
    if pairs.faults:
        others = len(pairs.faults) - 1
        more = f" ({others} more {'is' if others == 1 else 'are'} amiss: segnext data check names all)" if others else ""
        raise DataError(pairs.faults[0] + more)
    if not pairs:
        raise DataError(f"{root}: there are no images in the split {split}")
    return pairs


def splits(name: str) -> tuple[str, ...]:
    """The splits that a data set can have."""
    return kind(name).splits


def kind(name: str) -> Kind:
    """The data set of this name; if there is none, a DataError that lists those there are."""
    if name not in DATASETS:
        raise DataError(f"there is no data set {name!r}, only {', '.join(DATASETS)}")
    return DATASETS[name]
