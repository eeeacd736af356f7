"""Training, evaluation, and ``segnext demo`` from nothing to a checkpoint that ``segnext predict`` takes."""

from __future__ import annotations

import math
import shlex
import time
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from PIL import Image
from torchvision import tv_tensors

import segnext
import segnext_kernels
from segnext import cli
from segnext import demo as demo_module
from segnext.data import Scenes
from segnext.demo import demo
from segnext.evaluate import Scores, confusion_matrix, evaluate, table
from segnext.images import normalise
from segnext.palette import photo_image
from segnext.train import Recipe, batches, fit, parameter_groups, photo_augmentation

SCENES = Scenes(8, (32, 48))


def small_model() -> segnext.SegNeXt:
    return small.model(num_classes=10, drop_path=0.0)


@pytest.mark.parametrize("changes", [{}, {"bfloat16": True}], ids=str)
def test_fit_lowers_the_loss(changes):
    model = small_model()
    before = evaluate(model, SCENES, 10)
    losses = fit(model, SCENES, Recipe(steps=40, lr=5e-3, batch=4, **changes))
    assert len(losses) == 40 and not model.training
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert evaluate(model, SCENES, 10).pixel_accuracy > before.pixel_accuracy + 0.2


def test_fit_in_steps_is_reproducible():
    losses = [fit(small_model(), SCENES, Recipe(steps=3, batch=2, seed=seed)) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_fit_ends_with_its_time():
    start = time.perf_counter()
    losses = fit(small_model(), SCENES, Recipe(seconds=1.0, batch=2))
    assert len(losses) > 1 and 1.0 <= time.perf_counter() - start < 10


def test_fit_stops_where_the_loss_is_lost():
    with pytest.raises(FloatingPointError, match="smaller learning rate"):
        fit(small_model(), SCENES, Recipe(steps=20, batch=2, lr=1e30))


def test_recipe_takes_seconds_or_steps():
    for both in ({}, {"seconds": 1.0, "steps": 1}):
        with pytest.raises(ValueError, match="one of them"):
            Recipe(**both)


@pytest.mark.parametrize("progress, expected", [(0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.6, 0.5), (1.0, 0.0)])
def test_learning_rate_rises_and_falls(progress, expected):
    assert Recipe(steps=1, warmup=0.2).lr_factor(progress) == pytest.approx(expected)


def test_parameter_groups():
    model = small_model()
    decays = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.01) for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    decayed = {"backbone.norm1.weight": 0.0, "decode_head.conv_seg.weight": 0.01, "decode_head.conv_seg.bias": 0.0}
    assert {name: decays[id(model.get_parameter(name))] for name in decayed} == decayed


def test_batches_show_every_picture_before_any_again():
    dataset = [(torch.full((3, 1, 1), i), torch.full((1, 1), i)) for i in range(6)]
    stream = batches(dataset, Recipe(steps=1, batch=4))
    seen = [label for _ in range(3) for label in next(stream)[1].flatten().tolist()]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6)) and seen[:6] != seen[6:]


@pytest.mark.parametrize("size", [(60, 80), (80, 60), (24, 90)], ids=str)
def test_augmentation_moves_picture_and_mask_together(size):
    torch.manual_seed(0)
    labels = torch.zeros(size, dtype=torch.uint8)
    labels[:, : size[1] // 2] = 1
    image = (labels * 200 + 20).expand(3, -1, -1).contiguous()
    augment, agree, seen = photo_augmentation(size, (48, 64)), [], set()
    for _ in range(30):
        new_image, new_labels = augment(tv_tensors.Image(image), tv_tensors.Mask(labels))
        assert new_image.shape == (3, 48, 64) and new_labels.shape == (48, 64)
        seen |= set(new_labels.unique().tolist())
        grey, known = new_image.float().mean(0), new_labels != 255
        if new_labels[known].unique().numel() == 2:
            middle = (grey[new_labels == 0].median() + grey[new_labels == 1].median()) / 2
            agree.append(((grey > middle) == (new_labels == 1))[known].float().mean().item())
    assert len(agree) > 5 and min(agree) > 0.95
    assert seen <= {0, 1, 255}


def test_confusion_matrix_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 3]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 3]], dtype=torch.uint8)
    scores = Scores(confusion_matrix(prediction, truth, 4))
    assert scores.confusion.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert scores.pixel_accuracy == pytest.approx(5 / 7)
    assert scores.iou.tolist() == pytest.approx([2 / 4, 2 / 4, math.nan, 1.0], nan_ok=True)
    assert scores.miou == pytest.approx(2 / 3)
    assert str(scores) == "mIoU 0.667, pixel accuracy 0.714"
    assert table(["a", "long name", "c", "d"], {"before": scores}).splitlines()[2].split() == ["long", "name", "0.500"]


def test_confusion_matrix_of_many_classes_and_of_one():
    truth, prediction = torch.tensor([[149, 3, 255]], dtype=torch.uint8), torch.tensor([[149, 148, 0]])
    assert confusion_matrix(prediction, truth, 150).nonzero().tolist() == [[3, 148], [149, 149]]
    assert confusion_matrix(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 255, 0]]), 1).tolist() == [[2]]


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
    for name in ("SCENES_RECIPE", "PHOTOS_RECIPE"):
        monkeypatch.setattr(demo_module, name, replace(getattr(demo_module, name), batch=2))


def suggested_command(printed: str) -> list[str]:
    command = shlex.split(
        next(line for line in printed.splitlines() if line.startswith("try next: ")).removeprefix("try next: ")
    )
    return command[command.index("predict") :]


def test_demo_on_scenes(tmp_path, quick, capsys):
    out = tmp_path / "with a space"
    (out / "held_out").mkdir(parents=True)
    (out / "held_out" / "of_an_earlier_run.png").touch()
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
    pictures = sorted(path.name for path in (out / "held_out").iterdir())
    assert pictures == sorted(path.name for path in (out / "scenes").iterdir()) and len(pictures) == 5
    assert Image.open(out / "held_out" / pictures[0]).width >= 3 * 2 * 48
    model = segnext.load(out / "segnext-t.pth")
    assert (model.classes, model.palette, model.short_side) == (Scenes.classes, Scenes.palette, 32)

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
    assert segnext.load(out / "segnext-t.pth").short_side == 36
    assert cli.main(suggested_command(printed)) == 0
    mask = np.asarray(Image.open(out / "predicted" / "3_mask.png"))
    assert mask.shape == (40, 56) and mask.max() < 10


@pytest.mark.parametrize("supported", [False, True])
def test_bfloat16_is_chosen_by_the_device(monkeypatch, supported):
    """Neither the processor decides for a GPU nor a GPU for the processor."""
    monkeypatch.setattr(segnext_kernels, "build_info", lambda: {"isa": "avx2" if supported else "avx512_bf16"})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: supported)
    chosen = {name: demo_module._multiplies_bfloat16(torch.device(name)) for name in ("cuda:0", "cpu", "meta")}
    assert chosen == {"cuda:0": supported, "cpu": not supported, "meta": False}


def test_operators_are_named_by_the_device(monkeypatch):
    elsewhere = demo_module._machine(small_model(), "SegNeXt-T", 9, torch.device("meta"))
    assert elsewhere.endswith("9 s of training on meta, operators in plain PyTorch.")
    monkeypatch.setattr(segnext_kernels, "explain", lambda operator, x: {"cuda": "no", "cpu": "serves"})
    assert f"fused kernels for {segnext_kernels.build_info()['isa']}" in demo_module._machine(
        small_model(), "SegNeXt-T", 9, torch.device("cpu")
    )
