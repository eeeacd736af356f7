"""Drawn scenes, and folders of labelled photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segnext.data import DataError, Memory, MissingError, Scenes, open_dataset
from segnext.data.folder import read_classes
from segnext.evaluate import Scores, confusion_matrix
from segnext.images import ImageError, read_labels
from segnext.palette import generated_palette, mask_image


def test_scenes_depend_on_size_seed_and_index_only():
    scenes = Scenes(3, (48, 64))
    image, labels = scenes[1]
    again = Scenes(1000, (48, 64))
    again[0]
    assert torch.equal(again[1][0], image) and torch.equal(again[1][1], labels)
    assert not torch.equal(scenes[0][0], image) and not torch.equal(Scenes(3, (48, 64), seed=1)[1][0], image)


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (128, 160)], ids=str)
def test_scenes_types_and_sizes(size):
    image, labels = Scenes(1, size)[0]
    assert image.shape == (3, *size) and labels.shape == size
    assert image.dtype == labels.dtype == torch.uint8


def scenes_as_colours(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pixel's colour, as one of 512, and its label."""
    scenes = Scenes(count, (96, 120), seed)
    images, labels = (torch.stack(column).flatten(2 - i) for i, column in enumerate(zip(*scenes, strict=True)))
    return (images // 32).long().transpose(1, 2) @ torch.tensor([64, 8, 1]), labels.long()


def test_scenes_have_every_class_and_colours_do_not_tell_them_apart():
    classes = len(Scenes.classes)
    assert classes == len(Scenes.palette) >= 8
    colours, labels = scenes_as_colours(80, seed=0)
    shares = torch.bincount(labels.flatten(), minlength=classes) / labels.numel()
    assert shares.min() > 0.003 and shares.max() < 0.5
    likeliest = torch.bincount((colours * classes + labels).flatten(), minlength=512 * classes).view(512, classes).argmax(1)
    colours, labels = scenes_as_colours(40, seed=1)
    assert Scores(confusion_matrix(likeliest[colours], labels, classes)).miou < 0.2


def test_scenes_end():
    with pytest.raises(IndexError, match="2 scenes, no number 2"):
        Scenes(2)[2]
    with pytest.raises(ValueError, match="20x32"):
        Scenes(1, (20, 32))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two training pictures, upright and lying, and one for validation."""
    (tmp_path / "classes.txt").write_text("\ufeffroad\nsky\n\n", encoding="utf-8")  # as Windows' editors begin a file
    for split, name, size in (("train", "a", (12, 16)), ("train", "b", (20, 10)), ("val", "c", (8, 8))):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
        labels = np.zeros(size, np.uint8)
        labels[: size[0] // 2], labels[0, 0] = 1, 255
        Image.fromarray(labels).save(tmp_path / split / "masks" / f"{name}.png")
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(tmp_path / split / "images" / f"{name}.jpg")
    return tmp_path


def test_unused_numbers_are_called_by_them(tmp_path):
    (tmp_path / "classes.txt").write_text("road\n\n\nsky\n")
    assert read_classes(tmp_path / "classes.txt") == ["road", "class 1", "class 2", "sky"]


def read(folder: Path, split: str, short_side: int | None = None) -> Memory:
    return Memory(open_dataset("folder", folder, split), short_side)


def test_folder_pairs_images_and_masks(folder):
    data = read(folder, "train")
    assert (data.classes, data.names, len(data)) == (["road", "sky"], ["a", "b"], 2)
    image, labels = data[0]
    assert image.shape == (3, 12, 16) and labels.shape == (12, 16) and labels.dtype == torch.uint8
    assert labels[0, 0] == 255 and (labels[:6].flatten()[1:] == 1).all() and (labels[6:] == 0).all()


def test_folder_passes_over_hidden_files(folder):
    for kind, name in (("images", "._a.jpg"), ("masks", ".DS_Store")):
        (folder / "train" / kind / name).write_bytes(b"no image")
    assert read(folder, "train").names == ["a", "b"]


def test_folder_resizes_the_short_side(folder):
    data = read(folder, "train", short_side=6)
    assert [tuple(labels.shape) for _, labels in data] == [(6, 8), (12, 6)]
    assert all(image.shape[1:] == labels.shape for image, labels in data)
    assert set(data[0][1].unique().tolist()) <= {0, 1, 255}


def test_folder_without_splits_but_for_one(folder):
    """Pictures that are held out elsewhere leave all others for training."""
    for kind in ("images", "masks"):
        (folder / "train" / kind).rename(folder / kind)
    (folder / "train").rmdir()
    assert (read(folder, "train").names, read(folder, "val").names) == (["a", "b"], ["c"])
    (folder / "val").rename(folder / "test")
    assert (read(folder, "train").names, read(folder, "val").names) == (["b"], ["a"])
    (folder / "test").rename(folder / "train")
    with pytest.raises(MissingError, match="val: no such folder; --val none trains without it"):
        read(folder, "val")


def test_folder_reads_index_colour_masks(folder):
    path = folder / "val" / "masks" / "c.png"
    mask_image(read_labels(path), generated_palette(2)).save(path)
    assert Image.open(path).mode == "P"
    assert set(read(folder, "val")[0][1].unique().tolist()) == {0, 1, 255}


def missing_class_file(folder):
    (folder / "classes.txt").unlink()
    return "classes.txt: no such file"


def no_classes(folder):
    (folder / "classes.txt").write_text("\n")
    return "classes.txt: there must be 2 to 255 classes"


def one_class(folder):
    (folder / "classes.txt").write_text("road")
    return "classes.txt: there must be 2 to 255 classes, one a line .*; this file names 1"


def a_name_twice(folder):
    (folder / "classes.txt").write_text("road\nsky\nroad\n")
    return "classes.txt: road: more than one class of this name"


def no_masks(folder):
    (folder / "train" / "masks").rename(folder / "train" / "labels")
    return "masks: no such folder"


def image_without_mask(folder):
    (folder / "train" / "masks" / "b.png").unlink()
    return "images/b.jpg: there is no mask for this image"


def mask_without_image(folder):
    (folder / "train" / "images" / "a.jpg").unlink()
    return "masks/a.png: there is no image for this mask"


def two_of_a_name(folder):
    Image.new("RGB", (1, 1)).save(folder / "train" / "images" / "a.png")
    return "a.png and a.jpg: two files of the same name"


def other_size(folder):
    Image.new("L", (3, 4)).save(folder / "train" / "masks" / "b.png")
    return r"b.png: the mask is 4x3 pixels, its image 20x10"


def label_without_class(folder):
    Image.new("L", (10, 20), 2).save(folder / "train" / "masks" / "b.png")
    return "b.png: value 2 stands for none of the 2 classes"


def coloured_mask(folder):
    Image.new("RGB", (10, 20)).save(folder / "train" / "masks" / "b.png")
    return "b.png: a mask must be greyscale or index-colour.*RGB"


def broken_image(folder):
    (folder / "train" / "images" / "b.jpg").write_bytes(b"no image")
    return "b.jpg: not an image"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_class_file,
        no_classes,
        one_class,
        a_name_twice,
        no_masks,
        image_without_mask,
        mask_without_image,
        two_of_a_name,
        other_size,
        label_without_class,
        coloured_mask,
        broken_image,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_folder_errors_name_the_file(folder, spoil):
    message = spoil(folder)
    with pytest.raises((DataError, ImageError), match=message):
        read(folder, "train")
