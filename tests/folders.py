"""Small labelled data in folders, for the tests of training and evaluation."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from segnext.data import Scenes
from segnext.palette import photo_image

CLASSES = Scenes.classes


def folder(root: Path, train: int = 5, val: int = 2, size: tuple[int, int] = (40, 56), seed: int = 0) -> Path:
    """A folder as people have it: drawn scenes as photographs, {train,val}/{images,masks}/ and classes.txt."""
    for i, (image, labels) in enumerate(Scenes(train + val, size, seed)):
        split = root / ("train" if i < train else "val")
        for kind, picture in (("images", photo_image(image)), ("masks", Image.fromarray(labels.numpy()))):
            (split / kind).mkdir(parents=True, exist_ok=True)
            picture.save(split / kind / f"scene_{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root
