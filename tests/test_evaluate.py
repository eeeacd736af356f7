"""``segnext evaluate``: figures, files, and what it says when it cannot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import folders
import pytest
import small
import torch
from PIL import Image

import segnext
from segnext import cli
from segnext import evaluate as evaluate_module
from segnext.data import open_dataset
from segnext.errors import DeviceError
from segnext.evaluate import Scores, as_dict, confusion_matrix, evaluate, evaluate_weights, load_evaluation, table, view_of
from segnext.palette import generated_palette, mask_image
from segnext.predict import InputError
from segnext.recipes import RECIPES, RecipeError
from segnext.views import MULTI_SCALE, View, label_map


def test_confusion_matrix_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 3]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 3]], dtype=torch.uint8)
    scores = Scores(confusion_matrix(prediction, truth, 4))
    assert scores.confusion.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert scores.pixel_accuracy == pytest.approx(5 / 7)
    assert scores.accuracy.tolist() == pytest.approx([2 / 3, 2 / 3, math.nan, 1.0], nan_ok=True)
    assert scores.mean_accuracy == pytest.approx(7 / 9)
    assert scores.iou.tolist() == pytest.approx([2 / 4, 2 / 4, math.nan, 1.0], nan_ok=True)
    assert scores.miou == pytest.approx(2 / 3)
    assert str(scores) == "mIoU 0.667, pixel accuracy 0.714 (only 3 of 4 classes are in the pictures)"
    assert str(Scores(torch.ones(2, 2))) == "mIoU 0.333, pixel accuracy 0.500"
    lines = table(["a", "long name", "c", "d"], {"IoU": scores.iou, "accuracy": scores.accuracy}).splitlines()
    assert lines[0].split() == ["class", "IoU", "accuracy"] and lines[2].split() == ["long", "name", "0.500", "0.667"]
    mixed = {"IoU": 0.5, "accuracy": 0.666667}
    assert as_dict(["a", "b", "c", "d"], scores) == {
        "mIoU": 0.666667,
        "mean_accuracy": 0.777778,
        "pixel_accuracy": 0.714286,
        "classes": {"a": mixed, "b": mixed, "c": {"IoU": None, "accuracy": None}, "d": {"IoU": 1.0, "accuracy": 1.0}},
    }


def test_a_class_that_is_only_predicted_counts_as_zero():
    scores = Scores(confusion_matrix(torch.tensor([[1, 0]]), torch.tensor([[0, 0]]), 3))
    assert scores.iou.tolist() == pytest.approx([0.5, 0.0, math.nan], nan_ok=True) and scores.miou == 0.25
    assert scores.mean_accuracy == 0.5


def test_confusion_matrix_of_many_classes_and_of_one():
    truth, prediction = torch.tensor([[149, 3, 255]], dtype=torch.uint8), torch.tensor([[149, 148, 0]])
    assert confusion_matrix(prediction, truth, 150).nonzero().tolist() == [[3, 148], [149, 149]]
    assert confusion_matrix(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 255, 0]]), 1).tolist() == [[2]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return folders.folder(tmp_path_factory.mktemp("data") / "data", train=1, val=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    model = small.model(num_classes=10)
    model.scale = (40, 32)
    segnext.save(model, path)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluate_is_what_label_maps_say(data, workers):
    model, pairs = small.model(num_classes=10), open_dataset("folder", data, "val")
    view = View((64, 32), 8)
    model.train().backbone.norm1.eval()  # as who freezes statistics has it
    modes = [module.training for module in model.modules()]
    plain = small.model(num_classes=10)
    expected = sum(confusion_matrix(label_map(plain, image, view), labels, 10) for image, labels in pairs)
    seen = []
    scores = evaluate(model, pairs, 10, view, workers=workers, look=lambda name, *rest: seen.append((name, *rest)))
    assert torch.equal(scores.confusion, expected) and [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        evaluate(model, pairs, 10, view, look=lambda *_: 1 / 0)
    assert [module.training for module in model.modules()] == modes
    assert [name for name, *_ in seen] == pairs.names
    assert all(
        torch.equal(a, b) for (_, *shown), pair in zip(seen, pairs, strict=True) for a, b in zip(shown, pair, strict=False)
    )


def run(*arguments) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


def test_the_command(tmp_path, data, weights, capsys):
    options = (
        "--weights",
        weights,
        "--data",
        data,
        "--json",
        tmp_path / "scores.json",
        "--save-pictures",
        tmp_path / "pictures",
    )
    assert run(*options) == 0
    printed = capsys.readouterr().out.splitlines()
    scores = json.loads((tmp_path / "scores.json").read_text())
    model, pairs = segnext.load(weights), open_dataset("folder", data, "val")
    expected = evaluate(model, pairs, 10, View((40, 32)))
    assert scores["mIoU"] == pytest.approx(expected.miou, abs=2e-3)  # the command's model is fused
    assert scores["pixel_accuracy"] == pytest.approx(expected.pixel_accuracy, abs=2e-3) and scores["pictures"] == 4
    assert list(scores["classes"]) == folders.CLASSES
    assert printed[0].split() == ["class", "IoU", "accuracy"] and len(printed) == 12
    assert f"mIoU {scores['mIoU']:.3f}" in printed[-1] and "4 pictures" in printed[-1]
    assert sorted(path.stem for path in (tmp_path / "pictures").iterdir()) == pairs.names
    assert Image.open(tmp_path / "pictures" / f"{pairs.names[0]}.png").width >= 3 * 56


def test_pictures_have_the_truth_before_the_prediction(tmp_path):
    palette, labels = generated_palette(3), (torch.tensor([[0, 1], [2, 255]]), torch.tensor([[2, 0], [1, 1]]))
    evaluate_module._writer(tmp_path, list("abc"), palette)("a/b", torch.zeros(3, 2, 2, dtype=torch.uint8), *labels)
    sheet = Image.open(tmp_path / "a_b.png")
    for left, expected in zip((10, 20), labels, strict=True):
        assert sheet.crop((left, 24, left + 2, 26)) == mask_image(expected, palette).convert("RGB")


def test_figures_of_pictures_that_were_trained_on_are_told(monkeypatch, capsys):
    monkeypatch.setattr(evaluate_module, "evaluate_weights", lambda recipe, **_: print(recipe.val))
    for recipe, split, told in (("pascal-voc", None, True), ("pascal-voc", "val", False), ("ade20k", None, False)):
        chosen = () if split is None else ("--split", split)
        assert run("--weights", "w", "--data", "d", "--recipe", recipe, "--device", "cpu", *chosen) == 0
        *note, val = capsys.readouterr().out.splitlines()
        assert val == "val" and bool(note) == told and all("trains on trainval" in line for line in note)


def test_multi_scale_and_flip_by_the_command(tmp_path, data, weights):
    scores = {}
    for name, options in {"plain": (), "both": ("--multi-scale", "--flip"), "train": ("--split", "train")}.items():
        assert run("--weights", weights, "--data", data, "--json", tmp_path / name, *options, "--workers", 0) == 0
        scores[name] = json.loads((tmp_path / name).read_text())
    model, pairs = segnext.load(weights), open_dataset("folder", data, "val")
    expected = evaluate(model, pairs, 10, View((40, 32), ratios=MULTI_SCALE, flip=True))
    assert scores["both"]["mIoU"] == pytest.approx(expected.miou, abs=2e-3)
    assert scores["plain"] != scores["both"] and scores["train"]["pictures"] == 1


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "pascal-context"])
def test_recipes_say_how_is_tested(name):
    (recipe,) = RECIPES[name]
    view = view_of(recipe, multi_scale=True)
    assert (view.scale, view.multiple, view.window, view.stride) == (
        recipe.scale,
        recipe.multiple,
        recipe.window,
        recipe.stride,
    )
    assert view.ratios == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) and not view.flip and view_of(recipe).ratios == (1.0,)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--data", "{data}", "--weights", "{data}/absent.pth"), "absent.pth"),
        (("--data", "{data}/absent", "--weights", "{weights}"), "absent"),
        (("--data", "{data}", "--weights", "{weights}", "--split", "test"), "test: no such folder"),
        (("--data", "{data}", "--weights", "{weights}", "--recipe", "ade20k"), "there is no images"),
        (("--data", "{data}", "--weights", "{weights}", "--recipe", "ade"), "there is no recipe 'ade'"),
        (("--data", "{data}", "--weights", "{other}"), "tells 3 classes apart, folder in"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_line(tmp_path, data, weights, capsys, options, message):
    segnext.save(small.model(num_classes=3), tmp_path / "other.pth")
    assert run(*(option.format(data=data, weights=weights, other=tmp_path / "other.pth") for option in options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("segnext: ") and message in error and error.count("\n") == 1


def test_pictures_do_not_replace_the_data(tmp_path):
    data = folders.folder(tmp_path / "data", 2, 2)
    segnext.save(small.labelling(list(folders.CLASSES)), tmp_path / "w.pth")
    before = {path: path.read_bytes() for path in data.rglob("*.png")}
    for kind in ("images", "masks"):
        with pytest.raises(RecipeError, match="holds images or masks of the data; choose another folder"):
            evaluate_weights(tmp_path / "w.pth", data, RECIPES["folder"][0], pictures=data / "val" / kind)
    assert {path: path.read_bytes() for path in data.rglob("*.png")} == before


def test_pictures_do_not_replace_what_the_data_links_to(tmp_path):
    data = folders.folder(tmp_path / "data", 2, 2)
    segnext.save(small.labelling(list(folders.CLASSES)), tmp_path / "w.pth")
    (tmp_path / "originals").mkdir()
    for image in (data / "val" / "images").iterdir():
        image.rename(tmp_path / "originals" / image.name)
        image.symlink_to(tmp_path / "originals" / image.name)
    with pytest.raises(RecipeError, match="originals holds images or masks of the data"):
        evaluate_weights(tmp_path / "w.pth", data, RECIPES["folder"][0], pictures=tmp_path / "originals")


def test_classes_of_other_names(tmp_path, capsys):
    data = folders.folder(tmp_path / "data", 1, 1)
    first, second, *rest = folders.CLASSES
    for classes in ([second, first, *rest], [first, "something else", *rest], folders.CLASSES):
        segnext.save(small.labelling(list(classes)), tmp_path / "w.pth")
        capsys.readouterr()
        assert run("--data", data, "--weights", tmp_path / "w.pth") == (2 if classes[0] == second else 0)
        printed, error = capsys.readouterr()
        assert error.count("the same classes in another order") == (classes[0] == second)
        assert printed.count("1 of 10 names differ") == (classes[1] == "something else")


def test_masks_that_are_no_files_are_not_replaced():
    pairs = SimpleNamespace(files=[("a/1.png", object())])
    evaluate_module._outside(Path("b"), pairs)
    with pytest.raises(RecipeError, match="a holds images"):
        evaluate_module._outside(Path("a"), pairs)


def test_the_end_of_a_gpus_memory_is_told(data, weights, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate_module, "evaluate", full)
    with pytest.raises(DeviceError, match="the memory of cpu is too small; try --device cpu, or without --multi-scale"):
        evaluate_weights(weights, data, RECIPES["folder"][0], multi_scale=True)


def test_the_figures_folder_is_made(tmp_path, data, weights):
    assert run("--data", data, "--weights", weights, "--json", tmp_path / "new" / "scores.json") == 0
    assert json.loads((tmp_path / "new" / "scores.json").read_text())["pictures"] == 4
    with pytest.raises(RecipeError, match="new is a folder; name a file"):
        evaluate_weights(weights, data, RECIPES["folder"][0], json_file=tmp_path / "new")


def test_a_place_for_the_figures_is_found_before_the_pictures_are_looked_at(monkeypatch, data, weights):
    monkeypatch.setattr("segnext.evaluate.evaluate", lambda *args, **kwargs: pytest.fail("pictures were looked at"))
    with pytest.raises(OSError, match="'/proc'$"):  # nobody writes there
        evaluate_weights(weights, data, RECIPES["folder"][0], json_file="/proc/scores.json")


def test_counting_takes_no_more_memory_in_deterministic_trainings(monkeypatch):
    """There torchmetrics would make 64 GB of a picture of 512x683 with 150 classes."""
    import torchmetrics.functional.classification as metrics

    seen, count = [], metrics.multiclass_confusion_matrix

    def watched(*args, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return count(*args, **options)

    monkeypatch.setattr(metrics, "multiclass_confusion_matrix", watched)
    truth, prediction = torch.arange(150).repeat(9), torch.arange(150).repeat(9).flip(0)
    expected = confusion_matrix(prediction, truth, 150)
    with evaluate_module.algorithms(deterministic=True):
        assert torch.equal(confusion_matrix(prediction, truth, 150), expected)
        assert torch.are_deterministic_algorithms_enabled()
    assert seen == [False, False] and not torch.are_deterministic_algorithms_enabled()


def test_models_of_other_channels_are_told(tmp_path, data):
    segnext.save(small.model(num_classes=10, in_channels=4), tmp_path / "four.pth")
    with pytest.raises(InputError, match="takes 4 channels; photographs have 3"):
        evaluate_weights(tmp_path / "four.pth", data, RECIPES["folder"][0])


def test_a_checkpoint_says_how_it_is_shown_pictures(tmp_path, data, capsys, monkeypatch):
    (recipe,) = RECIPES["folder"]
    model = small.model(num_classes=10)
    segnext.save(model, tmp_path / "plain.pth")
    assert view_of(load_evaluation(tmp_path / "plain.pth", data, recipe)[2]) == View((2048, 512))
    monkeypatch.setattr(evaluate_module, "evaluate", lambda *_, **__: Scores(torch.eye(10, dtype=torch.int64)))
    evaluate_weights(tmp_path / "plain.pth", data, recipe)
    assert "plain.pth does not say at which scale it was trained" in capsys.readouterr().out
    model.scale, model.multiple, model.window, model.stride = (64, 32), 4, (16, 24), (8, 8)
    segnext.save(model, tmp_path / "windows.pth")
    assert view_of(load_evaluation(tmp_path / "windows.pth", data, recipe)[2]) == View((64, 32), 4, (16, 24), (8, 8))

    def asked(**shown) -> View:
        return view_of(load_evaluation(tmp_path / "windows.pth", data, recipe, shown=shown)[2])

    assert asked(multiple=1) == View((64, 32), 1, (16, 24), (8, 8))
    assert asked(window=None) == View((64, 32), 4)
    assert asked(scale=(80, 60)) == View((80, 60), 4, (16, 24), (8, 8))
    assert asked(scale=None) == view_of(load_evaluation(tmp_path / "windows.pth", data, recipe)[2])
    given = replace(recipe, scale=(40, 20), window=(9, 9), stride=(9, 9))
    assert view_of(load_evaluation(tmp_path / "windows.pth", data, given)[2]) == View((40, 20), 1, (9, 9), (9, 9))
