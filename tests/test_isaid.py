"""Cutting iSAID's large images into patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import save

from segnext import cli
from segnext.data import DataError, legend, open_dataset
from segnext.data.isaid import cut_isaid, read_mask
from segnext.images import ImageError

RNG = np.random.default_rng(0)
MASKS = ("Semantic_masks/images/images", "images")


def large(
    folder: Path, name: str, size: tuple[int, int], masks: str = MASKS[0], images: str = "images"
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask in iSAID's colours, as they are downloaded; returns the image and the labels."""
    image = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    labels = RNG.integers(0, 16, size)
    save(folder / images / f"{name}.png", image)
    save(folder / masks / f"{name}_instance_color_RGB.png", np.array(legend("isaid")[1])[labels])
    save(folder / masks / f"{name}_instance_id_RGB.png", image)
    return image, labels


@pytest.mark.parametrize("masks, images", [*((masks, "images") for masks in MASKS), (MASKS[0], "images/images")])
@pytest.mark.parametrize("workers", [0, 2])
def test_patches_cover_the_image_and_are_read_again(tmp_path, masks, images, workers):
    image, labels = large(tmp_path / "in/train", "P0000", (6, 9), masks, images)
    large(tmp_path / "in/val", "P0003", (4, 4), masks, images)
    assert cut_isaid(tmp_path / "in", tmp_path / "out", size=4, stride=3, workers=workers) == 7
    pairs = open_dataset("isaid", tmp_path / "out", "train")
    corners = [(top, left) for top in (0, 2) for left in (0, 3, 5)]  # 3 and 6 are moved inwards to 2 and 5
    assert pairs.names == [f"P0000_{top}_{top + 4}_{left}_{left + 4}" for top, left in corners]
    for (top, left), (patch, patch_labels) in zip(corners, pairs, strict=True):
        window = np.s_[top : top + 4, left : left + 4]
        assert np.array_equal(patch.permute(1, 2, 0), image[window]) and np.array_equal(patch_labels, labels[window])
    assert open_dataset("isaid", tmp_path / "out", "val").names == ["P0003_0_4_0_4"]


@pytest.mark.parametrize("size, corners", [((2, 3), [(0, 0)]), ((2, 6), [(0, 0), (0, 2)]), ((4, 1), [(0, 0)])], ids=str)
def test_small_images_are_filled_up(tmp_path, size, corners):
    image, labels = large(tmp_path / "in/train", "P0001", size)
    cut_isaid(tmp_path / "in", tmp_path / "out", size=4, stride=3)
    height, width = max(4, size[0]), max(4, size[1])
    whole, whole_labels = np.zeros((height, width, 3), np.uint8), np.full((height, width), 255)
    whole[: size[0], : size[1]], whole_labels[: size[0], : size[1]] = image, labels
    pairs = open_dataset("isaid", tmp_path / "out", "train")
    for (top, left), (patch, patch_labels) in zip(corners, pairs, strict=True):
        window = np.s_[top : top + 4, left : left + 4]
        assert np.array_equal(patch.permute(1, 2, 0), whole[window])
        assert np.array_equal(patch_labels, whole_labels[window])


def test_a_stride_that_leaves_gaps_is_refused(tmp_path):
    large(tmp_path / "in/train", "P0000", (4, 6))
    with pytest.raises(DataError, match="a stride of 5 leaves gaps between patches of 4"):
        cut_isaid(tmp_path / "in", tmp_path / "out", size=4, stride=5)


def test_greys_that_are_stretched_are_refused(tmp_path):
    path = tmp_path / "mask.pgm"
    path.write_bytes(b"P5\n2 1\n3\n\0\1")
    with pytest.raises(ImageError, match="save it as PNG"):
        read_mask(path)


def test_cutting_again_writes_what_is_lacking(tmp_path):
    large(tmp_path / "in/train", "P0000", (4, 6))
    large(tmp_path / "in/train", "P0001", (4, 4))
    assert cut_isaid(tmp_path / "in", tmp_path / "out", 4, 4) == 3
    images, masks = (sorted((tmp_path / "out" / kind / "train").iterdir()) for kind in ("img_dir", "ann_dir"))
    assert len(images) == len(masks) == 3
    images[0].unlink()
    masks[2].unlink()
    images[1].write_bytes(b"kept")
    assert cut_isaid(tmp_path / "in", tmp_path / "out", 4, 4) == 2
    assert images[1].read_bytes() == b"kept"
    assert Image.open(images[0]).size == Image.open(masks[2]).size == (4, 4)
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 6


@pytest.mark.parametrize("size, stride", [(3, 3), (4, 2)])
def test_patches_of_another_cutting_are_not_mixed(tmp_path, size, stride):
    large(tmp_path / "in/train", "P0000", (8, 8))
    cut_isaid(tmp_path / "in", tmp_path / "out", 4, 4)
    if size == 4:  # all that the coarser cutting has, and more
        cut_isaid(tmp_path / "in", tmp_path / "fine", size, stride)
        (tmp_path / "out").rename(tmp_path / "coarse")
        (tmp_path / "fine").rename(tmp_path / "out")
        size, stride = 4, 4
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(DataError, match=r"P0000_\d_\d_\d_\d\.png is no patch of this size and stride; choose an empty folder"):
        cut_isaid(tmp_path / "in", tmp_path / "out", size, stride)
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_command(tmp_path, capsys):
    large(tmp_path / "in/val", "P0003", (5, 5))
    arguments = ["data", "cut-isaid", str(tmp_path / "in"), str(tmp_path / "out"), "--size", "4", "--workers", "0"]
    assert cli.main(arguments) == 2 and "a stride of 512 leaves gaps between patches of 4" in capsys.readouterr().err
    assert cli.main([*arguments, "--stride", "4"]) == 0 and capsys.readouterr().out == "wrote 4 patches\n"
    assert cli.main([*arguments, "--stride", "1"]) == 0 and capsys.readouterr().out == "wrote 0 patches\n"
    assert cli.main(["data", "cut-isaid", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "neither train/images nor val/images" in capsys.readouterr().err


def test_errors_name_the_file(tmp_path):
    large(tmp_path / "train", "P0000", (4, 4))
    mask = tmp_path / "train" / MASKS[0] / "P0000_instance_color_RGB.png"
    save(mask, np.full((4, 4, 3), 7))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^\S*P0000_instance_color_RGB.png: colour \(7, 7, 7\)"):
            cut_isaid(tmp_path, tmp_path / "out", workers=workers)
    mask.write_bytes(b"no image")
    with pytest.raises(DataError, match="P0000_instance_color_RGB.png: not an image"):
        cut_isaid(tmp_path, tmp_path / "out")
    mask.rename(mask.with_name("P0009_instance_color_RGB.png"))
    with pytest.raises(DataError, match="P0000.png: there is no mask"):
        cut_isaid(tmp_path, tmp_path / "out")
