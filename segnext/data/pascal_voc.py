"""PASCAL VOC 2012, with the further labels of the Semantic Boundaries Dataset (SBD)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .find import by_name, find_root, first_of, match, read_list
from .legend import legend
from .masks import identity_table, look_up, matlab_files, read_by_table, read_matlab
from .pairs import MissingError, Pairs

TABLE = identity_table(21)
SBD = ("SBD", "VOCaug/dataset", "benchmark_RELEASE/dataset")


def pascal_voc(root: Path, split: str) -> Pairs:
    """PASCAL VOC 2012: 1464 images to train on, 1449 to validate on, 10582 in "trainaug" with the labels of SBD.

    ROOT/ or ROOT/VOC2012/ or ROOT/VOCdevkit/VOC2012/
        JPEGImages/*.jpg
        SegmentationClass/*.png                                    0 is background, 255 (the objects' borders) is ignored
        ImageSets/Segmentation/{train,val,trainval,trainaug}.txt
    of SBD, for "trainaug":
        SegmentationClassAug/*.png                                 beside SegmentationClass, or the original distribution:
        {cls/*.mat,train.txt,val.txt}                              in SBD/, VOCaug/dataset/ or benchmark_RELEASE/dataset/,
                                                                   in ROOT, VOCdevkit or VOC2012
    """
    lists = "ImageSets/Segmentation"
    voc = find_root(root, "VOC2012", "VOCdevkit/VOC2012", holds=f"{lists}/{'train' if split == 'trainaug' else split}.txt")
    masks, names_file = by_name(voc / "SegmentationClass", ".png"), voc / lists / f"{split}.txt"
    if split == "trainaug":
        sbd = first_of(*(base / name for base in (root, voc, voc.parent) for name in SBD))
        masks = _augmented(voc, sbd) | masks  # VOC's own labels are the better ones
        names = read_list(names_file) if names_file.exists() else _names_of_trainaug(voc / lists, sbd)
    else:
        names = read_list(names_file)
    files, faults = match(by_name(voc / "JPEGImages", ".jpg"), masks, names)
    return Pairs(*legend("pascal-voc"), files, _read_mask, faults)


def _augmented(voc: Path, sbd: Path) -> dict[str, Path]:
    """The masks of SBD by name."""
    if (voc / "SegmentationClassAug").is_dir():
        return by_name(voc / "SegmentationClassAug", ".png")
    if (sbd / "cls").is_dir():
        return matlab_files(sbd / "cls")
    raise MissingError(f"{voc}: the split trainaug needs SBD, as SegmentationClassAug in here or as SBD/cls beside it")


def _names_of_trainaug(lists: Path, sbd: Path) -> list[str]:
    """All that SBD and VOC's "train" have, without VOC's "val": SBD divides the images otherwise."""
    held_out = read_list(lists / "val.txt")
    labelled = [*read_list(sbd / "train.txt"), *read_list(sbd / "val.txt"), *read_list(lists / "train.txt")]
    return sorted(set(labelled).difference(held_out))


def _read_mask(path: str) -> Tensor:
    if path.endswith(".mat"):
        return look_up(read_matlab(path, "GTcls", "Segmentation"), TABLE, path)
    return read_by_table(path, TABLE)
