"""Cityscapes, finely annotated."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torchvision.datasets import Cityscapes

from ..palette import IGNORED
from .find import by_name, find_root, match
from .masks import lookup_table, read_by_table
from .pairs import Pairs

CLASSES = sorted((kind for kind in Cityscapes.classes if 0 <= kind.train_id < IGNORED), key=lambda kind: kind.train_id)
TABLE = lookup_table({kind.id: kind.train_id for kind in Cityscapes.classes if kind.id >= 0})  # -1 is in no mask


def cityscapes(root: Path, split: str) -> Pairs:
    """Cityscapes with fine annotations: 2975 images to train on, 500 to validate on, 1525 without labels to test on.

    ROOT/ or ROOT/cityscapes/
        leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png
        gtFine/{train,val,test}/CITY/*_gtFine_labelIds.png     ids 0 to 33, of which 19 are the classes, others ignored
    """
    root = find_root(root, "cityscapes", holds=f"leftImg8bit/{split}")
    images = by_name(root / "leftImg8bit" / split, "_leftImg8bit.png", "*/*")
    masks = by_name(root / "gtFine" / split, "_gtFine_labelIds.png", "*/*")
    names, palette = [kind.name for kind in CLASSES], [kind.color for kind in CLASSES]
    files, unpaired = match(images, masks)
    return Pairs(names, palette, files, partial(read_by_table, table=TABLE), unpaired)
