"""COCO-Stuff 164k."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..palette import IGNORED
from .find import by_name, find_root, first_of, match
from .legend import legend
from .masks import lookup_table, read_by_table
from .pairs import Pairs

FOLDERS = {"train": "train2017", "val": "val2017"}
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # category ids of 1 to 182 that the data set never got
IDS = [category for category in range(1, 183) if category not in UNUSED]
TABLE = lookup_table({**{category - 1: label for label, category in enumerate(IDS)}, IGNORED: IGNORED})


def coco_stuff(root: Path, split: str) -> Pairs:
    """COCO-Stuff 164k: things and stuff in the images of COCO 2017, 118287 to train on, 5000 to validate on.

    ROOT/{train2017,val2017}/*.jpg                    or in ROOT/images/
    ROOT/stuffthingmaps/{train2017,val2017}/*.png     or in ROOT/stuffthingmaps_trainval2017/ or ROOT/annotations/;
                                                      COCO's category ids minus 1, 255 is ignored
    """
    split = FOLDERS.get(split, split)
    images = by_name(coco_images(root, split), ".jpg")
    places = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations")
    masks = by_name(first_of(*(root / place / split for place in places)), ".png")
    masks = {name: path for name, path in masks.items() if "_" not in name}  # mmsegmentation puts NAME_labelTrainIds.png there
    files, unpaired = match(images, masks)
    return Pairs(*legend("coco-stuff"), files, partial(read_by_table, table=TABLE), unpaired)


def coco_images(root: Path, split: str) -> Path:
    """The folder of the images of COCO's split "train2017" or "val2017"."""
    return find_root(root, "images", holds=split) / split
