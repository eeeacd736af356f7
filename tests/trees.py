"""Small trees of files in the real layouts of the data sets, and the labels that must come out, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from scipy.io import savemat

from segnext.data import legend
from segnext.palette import mask_image

# Of PASCAL Context's 459 ids, those of the 59 classes in the order of their names.
CONTEXT_IDS = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159, 162),
    *(187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416),
    *(420, 424, 427, 440, 445, 454, 458),
)

Labels = dict[str, dict[str, list[list[int]]]]  # split: name: labels


def save(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def photo(path: Path, labels) -> None:
    """A photograph of the size of its labels."""
    save(path, np.full((*np.shape(labels), 3), 90))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def folder(root: Path) -> Labels:
    write(root / "classes.txt", "road\nsky\n")
    for split, name in (("train", "a"), ("val", "b")):
        photo(root / split / "images" / f"{name}.jpg", [[0, 1, 255]])
        save(root / split / "masks" / f"{name}.png", [[0, 1, 255]])
    return {"train": {"a": [[0, 1, 255]]}, "val": {"b": [[0, 1, 255]]}}


def ade20k(root: Path) -> Labels:
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        photo(root / "images" / split / f"{name}.jpg", [[0, 1], [2, 150]])
        save(root / "annotations" / split / f"{name}.png", [[0, 1], [2, 150]])
    labels = [[255, 0], [1, 149]]
    return {"train": {"ADE_train_00000001": labels}, "val": {"ADE_val_00000001": labels}}


def cityscapes(root: Path) -> Labels:
    for split, city in (("train", "aachen"), ("val", "munster"), ("test", "berlin")):
        name = f"{city}_000000_000019"
        ids = [[0, 7, 8, 11], [24, 33, 9, 29]]
        photo(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", ids)
        save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids)
        save(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", ids)
    labels = [[255, 0, 1, 2], [11, 18, 255, 255]]
    cities = {"train": "aachen", "val": "munster", "test": "berlin"}
    return {split: {f"{city}_000000_000019_leftImg8bit": labels} for split, city in cities.items()}


def coco_stuff(root: Path) -> Labels:
    for split, name in (("train2017", "000000000009"), ("val2017", "000000000139")):
        values = [[0, 10, 12, 89], [91, 181, 255, 26]]  # category ids 1, 11, 13, 90, 92, 182, none, 27
        photo(root / "images" / split / f"{name}.jpg", values)
        save(root / "stuffthingmaps" / split / f"{name}.png", values)
    labels = [[0, 10, 11, 79], [80, 170, 255, 24]]
    return {"train": {"000000000009": labels}, "val": {"000000000139": labels}}


def pascal_voc(root: Path) -> Labels:
    for split, names in {"train": ["2007_000032"], "val": ["2007_000033"], "trainval": ["2007_000032", "2007_000033"]}.items():
        write(root / "ImageSets/Segmentation" / f"{split}.txt", "\n".join(names) + "\n")
    for name in ("2007_000032", "2007_000033", "2008_000008"):  # the last is not segmented by VOC
        photo(root / "JPEGImages" / f"{name}.jpg", [[0, 15, 20, 255]])
    (root / "SegmentationClass").mkdir()
    for name in ("2007_000032", "2007_000033"):
        mask = mask_image(torch.tensor([[0, 15, 20, 255]]), legend("pascal-voc")[1])
        mask.save(root / "SegmentationClass" / f"{name}.png")
    first, second = {"2007_000032": [[0, 15, 20, 255]]}, {"2007_000033": [[0, 15, 20, 255]]}
    return {"train": first, "val": second, "trainval": first | second}


def pascal_context(root: Path) -> None:
    for split, name in (("train", "2008_000002"), ("val", "2008_000003")):
        photo(root / "JPEGImages" / f"{name}.jpg", [[0, 1, 59]])
        save(root / "SegmentationClassContext" / f"{name}.png", [[0, 1, 59]])
        write(root / "ImageSets/SegmentationContext" / f"{split}.txt", f"{name}\n")


def pascal_context_59(root: Path) -> Labels:
    pascal_context(root)
    return {"train": {"2008_000002": [[255, 0, 58]]}, "val": {"2008_000003": [[255, 0, 58]]}}


def pascal_context_60(root: Path) -> Labels:
    pascal_context(root)
    return {"train": {"2008_000002": [[0, 1, 59]]}, "val": {"2008_000003": [[0, 1, 59]]}}


def original_pascal_context(root: Path) -> None:
    """As the data set's own page gives it: ids of 459 classes in MATLAB files, and the lists of VOC 2010."""
    names = {number: f"other {number}" for number in range(1, 460)} | dict(
        zip(CONTEXT_IDS, legend("pascal-context")[0][1:], strict=True)
    )
    names[308] = "potted plant"  # blanks in names do not matter
    write(root / "labels.txt", "".join(f"{number}: {name}\n" for number, name in names.items()))
    for split, name in (("train", "2008_000002"), ("val", "2008_000003")):
        write(root / "ImageSets/Main" / f"{split}.txt", f"{name}\n2010_999999\n")  # the second has no labels
        photo(root / "JPEGImages" / f"{name}.jpg", [[0, 1, 2, 308], [284, 458, 459, 9]])
        (root / "trainval").mkdir(exist_ok=True)
        savemat(root / "trainval" / f"{name}.mat", {"LabelMap": np.array([[0, 1, 2, 308], [284, 458, 459, 9]], np.uint16)})


def original_pascal_context_59(root: Path) -> Labels:
    original_pascal_context(root)
    labels = [[255, 255, 0, 39], [36, 58, 255, 1]]
    return {"train": {"2008_000002": labels}, "val": {"2008_000003": labels}}


def original_pascal_context_60(root: Path) -> Labels:
    original_pascal_context(root)
    labels = [[0, 0, 1, 40], [37, 59, 0, 2]]
    return {"train": {"2008_000002": labels}, "val": {"2008_000003": labels}}


def rectangle(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def coco_voc(root: Path) -> Labels:
    categories = {1: "person", 5: "airplane", 18: "dog", 52: "banana"}
    crowd = {"size": [4, 6], "counts": [0, 8, 16]}  # the two columns on the left, from top to bottom
    patch = np.zeros((2, 2), np.uint8, "F")
    patch[1, 0] = 1
    packed = run_lengths.encode(patch)
    packed["counts"] = packed["counts"].decode()
    images = {9: (4, 6), 25: (4, 6), 30: (2, 2), 36: (2, 2)}
    annotations = [  # image, category, area, crowd, region
        (9, 18, 2, 0, rectangle(3, 1, 5, 2)),  # lies over the person, though it comes first
        (9, 1, 12, 0, rectangle(1, 0, 5, 3)),
        (9, 1, 8, 1, crowd),
        (9, 52, 1, 0, rectangle(5, 3, 6, 4)),
        (25, 52, 4, 0, rectangle(0, 0, 2, 2)),  # the only object of its image is none of VOC's
        (30, 5, 1, 0, packed),
        (36, 1, 4, 1, {"size": [2, 2], "counts": [0, 4]}),  # nothing but a crowd
    ]
    fields = ("image_id", "category_id", "area", "iscrowd", "segmentation")
    content = {
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "height": size[0], "width": size[1]} for i, size in images.items()],
        "annotations": [{"id": i, **dict(zip(fields, entry, strict=True))} for i, entry in enumerate(annotations)],
    }
    for split in ("train2017", "val2017"):
        write(root / "annotations" / f"instances_{split}.json", json.dumps(content))
        for number, size in images.items():
            photo(root / split / f"{number:012}.jpg", np.zeros(size))
    first = [[255, 15, 15, 15, 15, 0], [255, 15, 15, 12, 12, 0], [255, 15, 15, 15, 15, 0], [255, 255, 0, 0, 0, 0]]
    found = {"000000000009": first, "000000000030": [[0, 0], [1, 0]]}
    return {"train": found, "val": found}


def isaid(root: Path) -> Labels:
    name = "P0000_0_896_0_896"
    for split in ("train", "val"):
        photo(root / "img_dir" / split / f"{name}.png", np.zeros((2, 2)))
        colours = [[(0, 0, 0), (0, 0, 63)], [(0, 127, 255), (0, 100, 155)]]
        save(root / "ann_dir" / split / f"{name}_instance_color_RGB.png", colours)
    photo(root / "img_dir/val" / "P0001_0_896_0_896.png", np.zeros((1, 3)))
    save(root / "ann_dir/val" / "P0001_0_896_0_896_instance_color_RGB.png", [[0, 15, 255]])  # as mmsegmentation writes it
    first = {name: [[0, 1], [14, 15]]}
    return {"train": first, "val": first | {"P0001_0_896_0_896": [[0, 15, 255]]}}


TREES = {
    "folder": folder,
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "coco-stuff": coco_stuff,
    "pascal-voc": pascal_voc,
    "coco-voc": coco_voc,
    "pascal-context-59": pascal_context_59,
    "pascal-context-60": pascal_context_60,
    "isaid": isaid,
}
