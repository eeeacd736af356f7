"""Training, evaluation, and ``segnext demo`` from nothing to a checkpoint that ``segnext predict`` takes."""

from __future__ import annotations

import shlex
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from PIL import Image

import segnext
import segnext_kernels
from segnext import cli
from segnext import demo as demo_module
from segnext.data import Scenes
from segnext.demo import demo
from segnext.evaluate import confusion_matrix, evaluate
from segnext.images import normalise
from segnext.palette import photo_image

SCENES = Scenes(8, (32, 48))


def small_model() -> segnext.SegNeXt:
    return small.model(num_classes=10, drop_path=0.0)


def test_evaluate_is_what_predict_says():
    model = small_model().eval()
    pairs = [SCENES[0], (SCENES[1][0][:, :31], SCENES[1][1][:31])]
    expected = sum(confusion_matrix(model.predict(normalise(image[None])), labels[None], 10) for image, labels in pairs)
    assert torch.equal(evaluate(model, pairs, 10).confusion, expected)
    assert not model.training
    assert torch.equal(evaluate(model.train(), pairs, 10).confusion, expected) and model.training


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo_module, "HELD_OUT_SCENES", 9)
    monkeypatch.setattr(demo_module, "SCRATCH", replace(demo_module.SCRATCH, batch=2))


def suggested_command(printed: str) -> list[str]:
    command = shlex.split(
        next(line for line in printed.splitlines() if line.startswith("try next: ")).removeprefix("try next: ")
    )
    return command[command.index("predict") :]


def test_demo_on_scenes(tmp_path, quick, capsys):
    out = tmp_path / "with a space"
    (out / "held_out").mkdir(parents=True)
    somebodys = out / "held_out" / "of_somebody_else.png"
    somebodys.touch()
    assert cli.main(["demo", "--out", str(out), "--seconds", "2", "--image-size", "32x48"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "drawn by this program",
        "10 classes",
        "32x48 pixels",
        "before training: mIoU",
        "steps: mIoU",
        "9 held-out",
        "balloon",
    ):
        assert text in printed
    somebodys.unlink()  # it is still there
    pictures = sorted(path.name for path in (out / "held_out").iterdir())
    assert pictures == sorted(path.name for path in (out / "scenes").iterdir()) and len(pictures) == 5
    assert Image.open(out / "held_out" / pictures[0]).width >= 3 * 2 * 48
    model = segnext.load(out / "segnext-t.pth")
    assert (model.classes, model.palette, model.scale) == (Scenes.classes, Scenes.palette, (128, 32))

    assert cli.main(suggested_command(printed)) == 0
    masks = sorted((out / "predicted").glob("*_mask.png"))
    assert len(masks) == 5 and Image.open(masks[0]).size == (48, 32)


def test_demo_on_photographs(tmp_path, quick, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenes = Scenes(5, (40, 56))
    for i, (image, labels) in enumerate(scenes):
        folder = tmp_path / "data" / ("train" if i < 3 else "val")
        for kind, picture in (("images", photo_image(image)), ("masks", Image.fromarray(labels.numpy()))):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            picture.save(folder / kind / f"{i}.png")
    (tmp_path / "data" / "classes.txt").write_text("\n".join(Scenes.classes))

    before, after = demo(data=tmp_path / "data", image_size=(36, 48), seconds=2)
    printed = capsys.readouterr().out
    assert "3 for training, 2 held out, 10 classes, 36 pixels" in printed and "drawn" not in printed
    assert before.confusion.sum() == after.confusion.sum() == 2 * 36 * 50
    out = tmp_path / "demo" / "data"
    assert {path.name for path in (out / "held_out").iterdir()} == {"3.png", "4.png"}
    assert segnext.load(out / "segnext-t.pth").scale == (144, 36)
    assert cli.main(suggested_command(printed)) == 0
    mask = np.asarray(Image.open(out / "predicted" / "3_mask.png"))
    assert mask.shape == (40, 56) and mask.max() < 10


def test_operators_are_named_by_the_device(monkeypatch):
    elsewhere = demo_module._machine(small_model(), "SegNeXt-T", 9, torch.device("meta"))
    assert elsewhere.endswith("9 s of training on meta, operators in plain PyTorch.")
    monkeypatch.setattr(segnext_kernels, "explain", lambda operator, x: {"cuda": "no", "cpu": "serves"})
    assert f"fused kernels for {segnext_kernels.build_info()['isa']}" in demo_module._machine(
        small_model(), "SegNeXt-T", 9, torch.device("cpu")
    )
