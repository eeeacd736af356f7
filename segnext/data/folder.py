"""Labelled photographs in a folder."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from ..images import image_files
from ..palette import IGNORED, generated_palette
from .find import match
from .masks import identity_table, read_by_table
from .pairs import DataError, MissingError, Pairs


def folder(root: Path, split: str) -> Pairs:
    """Photographs of your own.

    ROOT/classes.txt                          one class a line, at least two
    ROOT/{train,val,...}/{images,masks}/      or, without folders of splits:
    ROOT/{images,masks}/                      "val" is every fifth pair by name, "train" are the others (all, beside ROOT/val)

    An image and its mask have the same name before the ending and the same size. A mask's pixel values (greyscale or palette
    indices, not in JPEG or another format that changes values) are line numbers of classes.txt counted from 0, or 255 where the
    pixel is to be ignored.
    """
    if not root.is_dir():
        raise MissingError(f"{root}: no such folder")
    classes = read_classes(root / "classes.txt")
    place = root / split
    if not place.is_dir():
        none_held_out = split == "val" and (root / "train").is_dir()
        if none_held_out or not (root / "images").is_dir() or split not in ("train", "val"):
            raise MissingError(f"{place}: no such folder{'; --val none trains without it' if none_held_out else ''}")
        place = root
    (images, twice), (masks, masks_twice) = (_by_stem(place / kind) for kind in ("images", "masks"))
    names = sorted(images.keys() | masks.keys())
    if not names:
        raise DataError(f"{place / 'images'}: there are no images in this folder")
    if place == root and not (root / "val").is_dir():
        fifth = set(names[::5])
        count = len(names)
        names = [name for name in names if (name in fifth) == (split == "val")]
        if not names:
            raise DataError(
                f"{place / 'images'}: every fifth of {count} pictures is for evaluation, which leaves none to train on; name"
                " the splits yourself by folders train/ and val/"
            )
    files, unpaired = match(images, masks, names)
    read_mask = partial(read_by_table, table=identity_table(len(classes)))
    return Pairs(classes, generated_palette(len(classes)), files, read_mask, [*twice, *masks_twice, *unpaired])


def read_classes(path: Path) -> list[str]:
    """The class names in a file of one a line; blank lines at the end are left out, others are called by their number."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file; it names the classes, one a line") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None
    classes = [line.strip() or f"class {number}" for number, line in enumerate(lines)]  # some numbers may be unused
    if not 2 <= len(classes) <= IGNORED:
        raise DataError(
            f"{path}: there must be 2 to {IGNORED} classes, one a line (what is no object is one too);"
            f" this file names {len(classes)}"
        )
    if twice := sorted(name for name, times in Counter(classes).items() if times > 1):
        raise DataError(f"{path}: {', '.join(twice)}: more than one class of this name")
    return classes


def _by_stem(place: Path) -> tuple[dict[str, Path], list[str]]:
    """The image files in a folder by their names before the ending, and a sentence for each whose name another has already."""
    if not place.is_dir():
        raise DataError(f"{place}: no such folder")
    files: dict[str, Path] = {}
    faults = []
    for path in image_files(place):
        if path.stem in files:
            faults.append(f"{path} and {files[path.stem].name}: two files of the same name before the ending")
        files.setdefault(path.stem, path)
    return files, faults
