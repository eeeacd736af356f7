"""The objects of COCO 2017 with the classes of PASCAL VOC, to train on before VOC itself."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..palette import IGNORED
from .coco_stuff import FOLDERS, coco_images
from .find import by_name
from .legend import legend
from .pairs import DataError, Pairs

RENAMED = {
    "airplane": "aeroplane",
    "couch": "sofa",
    "dining table": "diningtable",
    "motorcycle": "motorbike",
    "potted plant": "pottedplant",
    "tv": "tvmonitor",
}


class Objects(NamedTuple):
    """The objects in one image, as (label, run lengths of pycocotools), in the order in which they are drawn."""

    file: str
    image_id: int
    regions: list[tuple[int, dict]]

    def __str__(self) -> str:
        return f"{self.file}, image {self.image_id}"


def coco_voc(root: Path, split: str) -> Pairs:
    """COCO 2017's objects of PASCAL VOC's 20 classes on background; images without any are left out.

    ROOT/{train2017,val2017}/*.jpg                            or in ROOT/images/
    ROOT/annotations/instances_{train2017,val2017}.json

    Smaller objects lie over larger ones, crowds are ignored where no object is.
    """
    split = FOLDERS.get(split, split)
    folder, file = coco_images(root, split), root / "annotations" / f"instances_{split}.json"
    images, files, faults = by_name(folder, ".jpg"), [], []
    for name, objects in _read_objects(file, legend("pascal-voc")[0]):
        if Path(name).stem in images:
            files.append((images[Path(name).stem], objects))
        else:
            faults.append(f"{folder / name}: no such file, but {file.name} names it")
    return Pairs(*legend("pascal-voc"), files, draw, faults)


def draw(objects: Objects) -> Tensor:
    """The labels uint8 [H, W]."""
    from pycocotools import mask

    labels = torch.zeros(objects.regions[0][1]["size"], dtype=torch.uint8)
    for label, runs in objects.regions:
        labels[torch.from_numpy(mask.decode(runs)).bool()] = label
    return labels


def _read_objects(file: Path, classes: list[str]) -> list[tuple[str, Objects]]:
    """The file name of every image that has an object of these classes, and its objects, in the order of the names."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {kind["id"]: RENAMED.get(kind["name"], kind["name"]) for kind in content["categories"]}
        labels = {number: classes.index(name) for number, name in names.items() if name in classes}
        annotations = defaultdict(list)
        for annotation in content["annotations"]:
            if annotation["category_id"] in labels:
                annotations[annotation["image_id"]].append(annotation)
        found = []
        for image in sorted(content["images"], key=lambda image: image["file_name"]):
            drawn = sorted(annotations[image["id"]], key=lambda annotation: (-annotation["iscrowd"], -annotation["area"]))
            if drawn and not drawn[-1]["iscrowd"]:
                regions = [(IGNORED if a["iscrowd"] else labels[a["category_id"]], _run_lengths(a, image)) for a in drawn]
                found.append((image["file_name"], Objects(str(file), image["id"], regions)))
        return found
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO's instances: {type(error).__name__} {error}") from error


def _run_lengths(annotation: dict, image: dict) -> dict:
    """An annotation's region, small and quick to send to a worker: outlines take ten times as much."""
    from pycocotools import mask

    region, size = annotation["segmentation"], (image["height"], image["width"])
    if isinstance(region, list):
        outlines = [outline for outline in region if len(outline) >= 6]  # four numbers would be taken for a box
        return mask.merge(mask.frPyObjects(outlines, *size)) if outlines else mask.encode(np.zeros(size, np.uint8, "F"))
    return mask.frPyObjects(region, *size) if isinstance(region["counts"], list) else region
