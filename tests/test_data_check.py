"""``segnext data check``: every fault of a tree is found and named, and a healthy tree has none."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from trees import TREES, ade20k, photo, save, write

from segnext import cli
from segnext.data import DATASETS, open_dataset
from segnext.data.check import check, check_splits


def run(*arguments) -> int:
    return cli.main(["data", *map(str, arguments), *(("--workers", "0") if arguments[0] == "check" else ())])


@pytest.fixture
def tree(tmp_path) -> Path:
    """Three training pictures and one for validation; of the three classes there is no car."""
    write(tmp_path / "classes.txt", "road\nsky\ncar\n")
    for split, name, size in (("train", "a", (2, 4)), ("train", "b", (3, 2)), ("train", "c", (2, 2)), ("val", "d", (2, 2))):
        labels = np.zeros(size)
        labels[0], labels[1, 1] = 1, 255
        photo(tmp_path / split / "images" / f"{name}.png", labels)
        save(tmp_path / split / "masks" / f"{name}.png", labels)
    return tmp_path


def test_a_process_that_dies_is_told(tree, capsys, monkeypatch):
    """As from want of memory; nothing is said to be healthy then."""
    monkeypatch.setattr("segnext.data.check.read_image", lambda file: os.kill(os.getpid(), signal.SIGKILL))
    assert cli.main(["data", "check", str(tree), "--workers", "1"]) != 0
    printed = capsys.readouterr()
    assert "a process that reads pictures died" in printed.err and "faults: 0" not in printed.out


def test_healthy_tree(tree, capsys):
    assert run("check", tree) == 0
    printed = capsys.readouterr().out
    assert "train: pairs: 3; height 2 to 3, width 2 to 4; faults: 0" in printed
    assert "val: pairs: 1; height 2 to 2, width 2 to 2; faults: 0" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert rows["share"] == ["of", "pixels", "train", "val"]
    assert rows["road"] == ["46.667%", "33.333%"] and rows["sky"] == ["53.333%", "66.667%"]  # of 15 and 3 labelled pixels
    assert rows["car"] == ["0.000%", "0.000%"]
    assert rows["without"] == ["a", "class", "16.667%", "25.000%"]  # of 18 and 4 pixels
    assert "never in train: car\n" in printed and "never in val: car\n" in printed


def test_masks_that_cannot_be_read_have_no_shares(tree, capsys):
    for mask in tree.glob("*/masks/*.png"):
        save(mask, np.full((2, 2, 3), 9, np.uint8))
    assert run("check", tree) == 1
    printed = capsys.readouterr().out
    assert printed.count("docs/training.md shows how colours become labels") == 4
    assert "share of pixels" not in printed and "never in" not in printed


def test_report(tree):
    report = check(open_dataset("folder", tree, "train"))
    assert (report.pairs, report.faults, report.sizes) == (3, [], {(2, 4), (3, 2), (2, 2)})
    assert report.pixels.nonzero().flatten().tolist() == [0, 1, 255]
    assert report.pixels[[0, 1, 255]].tolist() == [7, 8, 3]
    assert report.shares == pytest.approx([7 / 15, 8 / 15, 0])


def test_every_fault_is_named_in_one_run(tree, capsys):
    train, val = tree / "train", tree / "val"
    save(train / "masks" / "a.png", np.full((2, 3), 7))
    photo(train / "images" / "lonely.png", [[0]])
    save(train / "masks" / "widow.png", [[0]])
    photo(train / "images" / "b.jpg", np.zeros((3, 2)))
    save(train / "masks" / "c.png", [[0, 1, 2], [0, 1, 2]])
    data = (val / "images" / "d.png").read_bytes()
    (val / "images" / "d.png").write_bytes(data[: len(data) // 2])
    (val / "masks" / "d.png").write_bytes(b"no image")
    photo(val / "images" / "e.png", [[0]])
    save(val / "masks" / "e.png", [[[1, 2, 3]]])
    assert run("check", tree) == 1
    printed = capsys.readouterr().out
    for fault in (
        f"{train / 'masks' / 'a.png'}: value 7 stands for none of the 3 classes",
        f"{train / 'images' / 'lonely.png'}: there is no mask for this image",
        f"{train / 'masks' / 'widow.png'}: there is no image for this mask",
        f"{train / 'images' / 'b.png'} and b.jpg: two files of the same name before the ending",
        f"{train / 'masks' / 'c.png'}: the mask is 2x3 pixels, its image 2x2",
        f"{val / 'images' / 'd.png'}: ",
        f"{val / 'masks' / 'd.png'}: not an image",
        f"{val / 'masks' / 'e.png'}: a mask must be greyscale or index-colour",
    ):
        assert printed.count(fault) == 1, fault
    assert "train: pairs: 3; height 2 to 3, width 2 to 4; faults: 5" in printed
    assert "val: pairs: 2; height 1 to 1, width 1 to 1; faults: 3" in printed


def masks_missing(tree):
    (tree / "val" / "masks").rename(tree / "val" / "labels")
    return "masks: no such folder"


def empty_split(tree):
    (tree / "val" / "images" / "d.png").unlink()
    (tree / "val" / "masks" / "d.png").unlink()
    return "images: there are no images in this folder"


def nothing_pairs(tree):
    (tree / "val" / "images" / "d.png").rename(tree / "val" / "images" / "e.png")
    return "there is no image with a mask"


@pytest.mark.parametrize("spoil", [masks_missing, empty_split, nothing_pairs])
def test_a_split_that_cannot_be_paired_does_not_hide_the_others(tree, capsys, spoil):
    fault = spoil(tree)
    assert run("check", tree) == 1
    printed = capsys.readouterr().out
    assert "train: pairs: 3" in printed and "faults: 0" in printed and fault in printed


def test_only_the_splits_that_are_asked_for(tree, capsys):
    (tree / "val" / "masks" / "d.png").write_bytes(b"no image")
    assert run("check", "--split", "train", tree) == 0
    assert "val" not in capsys.readouterr().out
    assert run("check", "--split", "train", "--split", "val", tree) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{}/absent"], "absent: no such folder"),
        (["{}", "--split", "test"], "test: no such folder"),
        (["{}", "--dataset", "camvid"], "there is no data set 'camvid', only folder"),
        (["{}", "--dataset", "camvid", "--split", "val"], "there is no data set 'camvid', only folder"),
        (["{}", "--dataset", "ade20k"], "there is no images/training in this folder, nor in ADEChallengeData2016"),
    ],
)
def test_what_prevents_checking_is_an_error(tree, capsys, arguments, message):
    assert run("check", *(argument.format(tree) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("segnext: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_can_be_checked(tmp_path, name):
    expected = TREES[name](tmp_path)
    reports = check_splits(name, tmp_path)
    assert {split: report.pairs for split, report in reports.items()} == {k: len(v) for k, v in expected.items()}
    for split, report in reports.items():
        assert report.faults == []
        labels = [label for rows in expected[split].values() for row in rows for label in row]
        assert report.pixels.tolist() == np.bincount(labels, minlength=256).tolist()


def test_faults_of_a_known_data_set(tmp_path):
    ade20k(tmp_path)
    save(tmp_path / "annotations/validation/ADE_val_00000001.png", [[0, 1], [2, 151]])
    save(tmp_path / "annotations/validation/ADE_val_00000002.png", [[0]])
    reports = check_splits("ade20k", tmp_path)
    assert reports["train"].faults == [] and [fault.rpartition("/")[2] for fault in reports["val"].faults] == [
        "ADE_val_00000002.png: there is no image for this mask",
        "ADE_val_00000001.png: value 151 stands for none of the 150 classes",
    ]


def test_worker_processes_find_the_same(tree):
    save(tree / "train" / "masks" / "a.png", [[7]])
    pairs = open_dataset("folder", tree, "train")
    alone, together = check(pairs), check(pairs, workers=2)
    assert alone.faults == together.faults and len(alone.faults) == 1
    assert alone.pixels.tolist() == together.pixels.tolist() and alone.sizes == together.sizes


def test_list_names_every_data_set(capsys):
    assert run("list") == 0
    printed = capsys.readouterr().out
    for name, kind in DATASETS.items():
        assert f"{name}: {kind.classes or 'any'} classes; splits train, val" in printed
    for layout in ("annotations/{training,validation}/", "gtFine", "stuffthingmaps", "SegmentationClassAug", "ann_dir"):
        assert layout in printed


@pytest.mark.parametrize("name, missing", [("coco-voc", "pycocotools"), ("pascal-voc", "scipy")])
def test_missing_extras_are_named_in_one_line(tmp_path, capsys, monkeypatch, name, missing):
    TREES[name](tmp_path)
    save(tmp_path / "SBD/cls/unread.png", [[0]])
    monkeypatch.setitem(sys.modules, missing, None)
    assert run("check", tmp_path, "--dataset", name) == 2
    assert capsys.readouterr().err == f"segnext: this needs {missing}: pip install 'segnext-kernels[train]'\n"
