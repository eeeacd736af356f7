"""PASCAL Context, of VOC 2010, with its 59 frequent classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from ..palette import IGNORED, Colour
from .find import by_name, find_root, first_of, match, read_list
from .legend import legend
from .masks import look_up, lookup_table, matlab_files, read_by_table, read_matlab
from .pairs import DataError, Pairs


def pascal_context_59(root: Path, split: str) -> Pairs:
    """PASCAL Context without background, which is ignored: 4998 images to train on, 5105 to validate on.

    The files are those of pascal-context-60.
    """
    classes, palette = legend("pascal-context")
    return _pairs(root, split, classes[1:], palette[1:], [IGNORED, *range(59)])


def pascal_context_60(root: Path, split: str) -> Pairs:
    """PASCAL Context with background as class 0: 4998 images to train on, 5105 to validate on.

    ROOT/ or ROOT/VOC2010/ or ROOT/VOCdevkit/VOC2010/
        JPEGImages/*.jpg
        SegmentationClassContext/*.png                     0 is background, 1 to 59 are the classes, with the lists
        ImageSets/SegmentationContext/{train,val}.txt
    or the original distribution:
        trainval/*.mat                                     ids of the 459 classes in labels.txt; here, in VOCdevkit or ROOT
        labels.txt                                         beside trainval or in it, lines as "397: table"
        ImageSets/{Main,Segmentation}/{train,val}.txt      VOC 2010's lists, of which the images with a .mat are taken
    """
    return _pairs(root, split, *legend("pascal-context"), range(60))


def _pairs(root: Path, split: str, classes: list[str], palette: list[Colour], labels: Sequence[int]) -> Pairs:
    """``labels``: what the background and the 59 classes become."""
    voc = find_root(root, "VOC2010", "VOCdevkit/VOC2010", holds="JPEGImages")
    names = read_list(
        first_of(*(voc / "ImageSets" / kind / f"{split}.txt" for kind in ("SegmentationContext", "Main", "Segmentation")))
    )
    if (voc / "SegmentationClassContext").is_dir():
        masks = by_name(voc / "SegmentationClassContext", ".png")
        read_mask = partial(read_by_table, table=lookup_table(dict(enumerate(labels))))
    else:
        folder = first_of(*(base / "trainval" for base in (voc, voc.parent, root)))
        masks = matlab_files(folder)
        names = [name for name in names if name in masks]
        table = _table_of_459(first_of(folder.parent / "labels.txt", folder / "labels.txt"), labels)
        read_mask = partial(_read_459, table=table)
    files, faults = match(by_name(voc / "JPEGImages", ".jpg"), masks, names)
    return Pairs(classes, palette, files, read_mask, faults)


def _table_of_459(path: Path, labels: Sequence[int]) -> np.ndarray:
    """The label of each of the ids that a file names; whatever is not among the 59 classes is background."""
    try:
        lines = [line.partition(":") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        ids = {name.replace(" ", ""): int(number) for number, _, name in lines}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it names the ids in trainval/*.mat") from None
    except ValueError:
        raise DataError(f"{path}: the lines must be as '397: table'") from None
    background, *others = labels
    classes = legend("pascal-context")[0][1:]
    absent = [name for name in classes if name not in ids]
    if absent:
        raise DataError(f"{path}: there is no id for {', '.join(absent)}")
    known = {number: background for number in (0, *ids.values())}
    return lookup_table(known | {ids[name]: label for name, label in zip(classes, others, strict=True)})


def _read_459(path: str, table: np.ndarray) -> Tensor:
    return look_up(read_matlab(path, "LabelMap"), table, path)
