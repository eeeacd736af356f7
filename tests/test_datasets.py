"""The readers of data sets: their labels, pixel by pixel, their class names, and what they say of what is amiss."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import SBDataset
from trees import (
    TREES,
    original_pascal_context,
    original_pascal_context_59,
    original_pascal_context_60,
    pascal_voc,
    photo,
    save,
    write,
)

from segnext.data import DATASETS, DataError, MissingError, Pairs, open_dataset, splits
from segnext.images import ImageError

ORIGINALS = [("pascal-context-59", original_pascal_context_59), ("pascal-context-60", original_pascal_context_60)]


def test_every_data_set_is_tried():
    assert list(TREES) == list(DATASETS) and all({"train", "val"} <= set(splits(name)) for name in DATASETS)


@pytest.mark.parametrize("name, build", [*TREES.items(), *ORIGINALS], ids=lambda value: getattr(value, "__name__", value))
def test_labels_are_those_worked_out_by_hand(tmp_path, name, build):
    for split, expected in build(tmp_path).items():
        pairs = open_dataset(name, tmp_path, split)
        assert pairs.names == list(expected)
        assert len(pairs.classes) == len(pairs.palette) == (DATASETS[name].classes or 2)
        for (image, labels), values in zip(pairs, expected.values(), strict=True):
            assert image.dtype == labels.dtype == torch.uint8
            assert image.shape == (3, *labels.shape) and labels.tolist() == values


@pytest.mark.parametrize("name", TREES)
def test_worker_processes_can_be_sent_every_data_set(tmp_path, name):
    TREES[name](tmp_path)
    pairs = open_dataset(name, tmp_path, "val")
    assert torch.equal(pickle.loads(pickle.dumps(pairs))[0][1], pairs[0][1])


@pytest.mark.parametrize(
    "name, count, label, class_name, colour",
    [
        ("ade20k", 150, 0, "wall", (120, 120, 120)),
        ("ade20k", 150, 12, "person", (150, 5, 61)),
        ("ade20k", 150, 149, "flag", (92, 0, 255)),
        ("cityscapes", 19, 11, "person", (220, 20, 60)),
        ("cityscapes", 19, 18, "bicycle", (119, 11, 32)),
        ("coco-stuff", 171, 0, "person", (0, 192, 64)),
        ("coco-stuff", 171, 79, "toothbrush", (192, 160, 0)),
        ("coco-stuff", 171, 80, "banner", (0, 192, 0)),
        ("coco-stuff", 171, 170, "wood", (64, 64, 0)),
        ("pascal-voc", 21, 0, "background", (0, 0, 0)),
        ("pascal-voc", 21, 15, "person", (192, 128, 128)),
        ("coco-voc", 21, 20, "tvmonitor", (0, 64, 128)),
        ("pascal-context-59", 59, 0, "aeroplane", (180, 120, 120)),
        ("pascal-context-60", 60, 0, "background", (120, 120, 120)),
        ("pascal-context-60", 60, 59, "wood", (31, 0, 255)),
        ("isaid", 16, 1, "ship", (0, 0, 63)),
        ("isaid", 16, 14, "plane", (0, 127, 255)),
    ],
)
def test_class_names_and_colours(tmp_path, name, count, label, class_name, colour):
    TREES[name](tmp_path)
    pairs = open_dataset(name, tmp_path, "train")
    assert (len(pairs.classes), pairs.classes[label], pairs.palette[label]) == (count, class_name, colour)


@pytest.mark.parametrize(
    "name, inside",
    [
        ("ade20k", "ADEChallengeData2016"),
        ("cityscapes", "cityscapes"),
        ("pascal-voc", "VOC2012"),
        ("pascal-voc", "VOCdevkit/VOC2012"),
        ("pascal-context-60", "VOCdevkit/VOC2010"),
        ("isaid", "iSAID"),
    ],
)
def test_the_parent_of_a_data_set_will_do(tmp_path, name, inside):
    expected = TREES[name](tmp_path / inside)
    assert open_dataset(name, tmp_path, "train").names == list(expected["train"])


@pytest.mark.parametrize("images", [".", "images"])
@pytest.mark.parametrize("masks", ["stuffthingmaps", "stuffthingmaps_trainval2017", "annotations"])
def test_coco_stuff_in_every_usual_place(tmp_path, images, masks):
    photo(tmp_path / images / "val2017" / "000000000139.jpg", [[0]])
    save(tmp_path / masks / "val2017" / "000000000139.png", [[91]])
    save(tmp_path / masks / "val2017" / "000000000139_labelTrainIds.png", [[3]])  # of mmsegmentation's converter
    pairs = open_dataset("coco-stuff", tmp_path, "val")
    assert [labels.tolist() for _, labels in pairs] == [[[80]]]


def sbd(root: Path, segmentation: dict[str, list[list[int]]]) -> None:
    for name, values in segmentation.items():
        (root / "cls").mkdir(parents=True, exist_ok=True)
        content = {"Boundaries": np.zeros((20, 1)), "Segmentation": np.array(values, np.uint8), "CategoriesPresent": [[1]]}
        savemat(root / "cls" / f"{name}.mat", {"GTcls": content})
    write(root / "train.txt", "2008_000008\n2007_000033\n")
    write(root / "val.txt", "2007_000032\n")


@pytest.mark.parametrize("place", ["SBD", "VOCdevkit/VOCaug/dataset", "VOCdevkit/VOC2012/benchmark_RELEASE/dataset"])
def test_trainaug_of_matlab_files(tmp_path, place):
    """SBD's images and VOC's training ones without VOC's validation; where VOC has labels, they are taken."""
    pascal_voc(tmp_path / "VOCdevkit/VOC2012")
    further = {"2008_000008": [[0, 7, 7, 0]], "2007_000032": [[1, 1, 1, 1]], "2007_000033": [[2, 2, 2, 2]]}
    sbd(tmp_path / place, further)
    (tmp_path / place / "img").symlink_to(tmp_path / "VOCdevkit/VOC2012/JPEGImages")
    pairs = open_dataset("pascal-voc", tmp_path, "trainaug")
    assert {name: labels.tolist() for name, (_, labels) in zip(pairs.names, pairs, strict=True)} == {
        "2007_000032": [[0, 15, 20, 255]],
        "2008_000008": [[0, 7, 7, 0]],
    }
    theirs = SBDataset(tmp_path / place, "train", mode="segmentation")[0][1]  # the files are such as torchvision reads
    assert np.array_equal(theirs, further["2008_000008"])


@pytest.mark.parametrize("line", ["2008_000008", "/JPEGImages/2008_000008.jpg /SegmentationClassAug/2008_000008.png"])
def test_trainaug_of_converted_files(tmp_path, line):
    pascal_voc(tmp_path)
    save(tmp_path / "SegmentationClassAug" / "2008_000008.png", [[0, 7, 7, 0]])
    write(tmp_path / "ImageSets/Segmentation/trainaug.txt", f"{line}\n2007_000032\n")
    pairs = open_dataset("pascal-voc", tmp_path, "trainaug")
    assert pairs.names == ["2008_000008", "2007_000032"]
    assert [labels.tolist() for _, labels in pairs] == [[[0, 7, 7, 0]], [[0, 15, 20, 255]]]


def test_folder_without_splits_is_divided_by_name(tmp_path):
    write(tmp_path / "classes.txt", "road\nsky")
    for i in range(11):
        photo(tmp_path / "images" / f"{i:02}.jpg", [[0]])
        save(tmp_path / "masks" / f"{i:02}.png", [[0]])
    assert open_dataset("folder", tmp_path, "val").names == ["00", "05", "10"]
    assert open_dataset("folder", tmp_path, "train").names == ["01", "02", "03", "04", "06", "07", "08", "09"]
    for i in range(1, 11):
        (tmp_path / "images" / f"{i:02}.jpg").unlink()
        (tmp_path / "masks" / f"{i:02}.png").unlink()
    with pytest.raises(DataError, match="every fifth of 1 pictures is for evaluation, which leaves none to train on"):
        open_dataset("folder", tmp_path, "train")


def test_names_are_unique():
    files = [(Path(city, "0.png"), Path(city, "0_mask.png")) for city in ("aachen", "bonn")]
    assert Pairs(["a"], [(0, 0, 0)], files, str).names == ["aachen/0", "bonn/0"]
    assert Pairs(["a"], [(0, 0, 0)], files[:1], str).names == ["0"]


def unlabelled(root):
    (root / "annotations/training/ADE_train_00000001.png").rename(root / "annotations/training/ADE_train_00000002.png")
    return "images/training/ADE_train_00000001.jpg: there is no mask for this image .1 more is amiss: segnext data check"


def masks_missing(root):
    (root / "annotations").rename(root / "labels")
    return "annotations/training: no such folder"


def masks_of_another_kind(root):
    (root / "annotations/training/ADE_train_00000001.png").rename(root / "annotations/training/ADE_train_00000001.jpg")
    return r"annotations/training: there are no files \*.png"


def beyond_the_classes(root):
    save(root / "annotations/training/ADE_train_00000001.png", [[0, 1], [2, 151]])
    return "ADE_train_00000001.png: value 151 stands for none of the 150 classes"


def licence_plate(root):
    save(root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png", [[34] * 4] * 2)
    return "labelIds.png: value 34 stands for none of the 19 classes"


def unused_category(root):
    save(root / "stuffthingmaps/train2017/000000000009.png", [[11] * 4] * 2)  # category 12, a street sign
    return "000000000009.png: value 11 stands for none of the 171 classes"


def listed_but_absent(root):
    write(root / "ImageSets/Segmentation/train.txt", "2007_000032\n2099_000001\n")
    return "2099_000001: listed, but there is neither image nor mask"


def other_size(root):
    save(root / "SegmentationClass/2007_000032.png", [[0], [1]])
    return "2007_000032.png: the mask is 2x1 pixels, its image 1x4"


def broken_json(root):
    write(root / "annotations/instances_train2017.json", '{"images": [')
    return "instances_train2017.json: not COCO's instances"


def json_of_captions(root):
    write(root / "annotations/instances_train2017.json", '{"images": [], "annotations": []}')
    return "instances_train2017.json: not COCO's instances: KeyError 'categories'"


def coco_image_absent(root):
    (root / "train2017/000000000009.jpg").unlink()
    return "000000000009.jpg: no such file, but instances_train2017.json names it"


def coco_image_of_other_size(root):
    photo(root / "train2017/000000000009.jpg", [[0]])
    return "instances_train2017.json, image 9: the mask is 4x6 pixels, its image 1x1"


def unknown_colour(root):
    save(root / "ann_dir/train/P0000_0_896_0_896_instance_color_RGB.png", [[(0, 0, 63), (1, 2, 3)]] * 2)
    return r"color_RGB.png: colour \(1, 2, 3\) stands for none of the 16 classes"


ERRORS = {
    "ade20k": (unlabelled, masks_missing, masks_of_another_kind, beyond_the_classes),
    "cityscapes": (licence_plate,),
    "coco-stuff": (unused_category,),
    "pascal-voc": (listed_but_absent, other_size),
    "coco-voc": (broken_json, json_of_captions, coco_image_absent, coco_image_of_other_size),
    "isaid": (unknown_colour,),
}


@pytest.mark.parametrize(
    "name, spoil", [(name, spoil) for name in ERRORS for spoil in ERRORS[name]], ids=lambda v: getattr(v, "__name__", v)
)
def test_errors_name_the_file(tmp_path, name, spoil):
    TREES[name](tmp_path)
    message = spoil(tmp_path)
    with pytest.raises((DataError, ImageError), match=message):
        list(open_dataset(name, tmp_path, "train"))


def no_labels_file(root):
    (root / "labels.txt").unlink()
    return "labels.txt: no such file"


def labels_file_lacks_a_class(root):
    write(root / "labels.txt", "2: aeroplane\n")
    return "labels.txt: there is no id for bag, bed"


def broken_matlab_file(root):
    write(root / "trainval/2008_000002.mat", "no labels")
    return "2008_000002.mat: LabelMap cannot be read"


def id_beyond_459(root):
    savemat(root / "trainval/2008_000002.mat", {"LabelMap": np.array([[460] * 4] * 2, np.uint16)})
    return "2008_000002.mat: value 460 stands for none"


@pytest.mark.parametrize("spoil", [no_labels_file, labels_file_lacks_a_class, broken_matlab_file, id_beyond_459])
def test_errors_of_the_original_pascal_context(tmp_path, spoil):
    original_pascal_context(tmp_path)
    message = spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        list(open_dataset("pascal-context-60", tmp_path, "train"))


def test_unknown_data_set_lists_those_there_are(tmp_path):
    with pytest.raises(DataError, match="there is no data set 'ade', only folder, ade20k, cityscapes"):
        open_dataset("ade", tmp_path, "train")


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_not_there_at_all_is_missing(tmp_path, name):
    with pytest.raises(MissingError, match=tmp_path.name):
        open_dataset(name, tmp_path, "train")
    TREES[name](tmp_path)
    with pytest.raises(MissingError, match="extra"):
        open_dataset(name, tmp_path, "extra")
    with pytest.raises(MissingError, match="absent.*: no such f"):
        open_dataset(name, tmp_path / "absent", "train")


def test_trainaug_without_sbd(tmp_path):
    pascal_voc(tmp_path)
    with pytest.raises(MissingError, match="trainaug needs SBD"):
        open_dataset("pascal-voc", tmp_path, "trainaug")
