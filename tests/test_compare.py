"""``segnext compare`` from files to a figure, with a small SegFormer that transformers saved."""

from __future__ import annotations

import json
import shutil

import folders
import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import segnext
from segnext import WeightsError, cli, compare
from segnext.cli import look
from segnext.figure import GAP, LINE, fitting_legend
from segnext.images import normalise, read_image, read_labels
from segnext.palette import IGNORED, generated_palette, overlay
from segnext.predict import InputError, segment

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, WIDTH, HEIGHT = len(folders.CLASSES), 56, 40
PALETTE = generated_palette(COUNT)


def save_segformer(folder, classes: int = COUNT) -> None:
    torch.manual_seed(0)
    config = SegformerConfig(
        depths=[1] * 4,
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1] * 4,
        decoder_hidden_size=16,
        num_labels=classes,
    )
    model = SegformerForSemanticSegmentation(config)
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two photos of 40x56 pixels with masks, SegFormers, and a model."""
    root = folders.folder(tmp_path_factory.mktemp("compare"), train=0, val=2, size=(HEIGHT, WIDTH))
    save_segformer(root / "segformer")
    save_segformer(root / "segformer_3", 3)
    model = small.labelling(list(folders.CLASSES))
    model.scale = (WIDTH, HEIGHT)
    segnext.save(model, root / "small.pth")
    return root


def photo(files, i: int = 0):
    return files / "val" / "images" / f"scene_{i}.png"


def mask(files, i: int = 0):
    return files / "val" / "masks" / f"scene_{i}.png"


def run(files, *arguments, photos=(0,), masks=(0,), other="segformer") -> int:
    inputs = [*(photo(files, i) for i in photos), "--truth", *(mask(files, i) for i in masks)]
    options = ("--with", files / other, "--weights", files / "small.pth", "--width", WIDTH)
    return cli.main(["compare", *map(str, (*inputs, *options, *arguments))])


def cell(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    left, top = GAP + column * (WIDTH + GAP), GAP + row * (HEIGHT + GAP)
    return np.asarray(sheet.crop((left, top, left + WIDTH, top + HEIGHT)))


def test_rows_are_segformer_segnext_and_truth(files):
    assert run(files, "--out", files / "out.png", photos=(0, 1), masks=(0, 1)) == 0
    sheet = Image.open(files / "out.png")
    models = compare.load_segformer(str(files / "segformer")), segnext.load(files / "small.pth")
    occurring = set()
    for row in (0, 1):
        image, truth = read_image(photo(files, row)), read_labels(mask(files, row))
        maps = [*(segment(model, image, 512) for model in models), truth]
        for column, labels in enumerate(maps):
            shown = np.asarray(overlay(image, labels, PALETTE, 0.7))
            assert (cell(sheet, row, column) == shown).all(-1).mean() > 0.99  # the command fuses the model
        occurring.update(*(labels.unique().tolist() for labels in maps))
        assert (maps[0] != maps[1]).any() and (maps[1] != maps[2]).any()
    names, colours = zip(*((folders.CLASSES[i], PALETTE[i]) for i in sorted(occurring - {IGNORED})), strict=True)
    legend = fitting_legend(names, colours, 3 * WIDTH)
    top = GAP + 2 * (HEIGHT + GAP) + LINE
    assert sheet.size == (max(3 * (WIDTH + GAP) + GAP, legend.width), top + legend.height + GAP)
    np.testing.assert_array_equal(np.asarray(sheet.crop((0, top, legend.width, top + legend.height))), np.asarray(legend))


def test_the_legend_has_only_the_classes_that_occur(files, tmp_path):
    """Every model says 2, and the truth has 1 and 3."""
    model = segnext.load(files / "small.pth")
    torch.nn.init.zeros_(model.decode_head.conv_seg.weight)
    model.decode_head.conv_seg.bias.data = F.one_hot(torch.tensor(2), COUNT).float()
    segnext.save(model, tmp_path / "two.pth")
    other = SegformerForSemanticSegmentation.from_pretrained(files / "segformer")
    torch.nn.init.zeros_(other.decode_head.classifier.weight)
    other.decode_head.classifier.bias.data = F.one_hot(torch.tensor(2), COUNT).float()
    other.save_pretrained(tmp_path / "two")
    labels = np.full((HEIGHT, WIDTH), 1, np.uint8)
    labels[:20], labels[20:22] = 3, IGNORED
    Image.fromarray(labels).save(tmp_path / "mask.png")
    arguments = [photo(files), "--truth", tmp_path / "mask.png", "--with", tmp_path / "two", "--weights", tmp_path / "two.pth"]
    assert cli.main(list(map(str, ["compare", *arguments, "--width", 0, "--out", tmp_path / "out.png"]))) == 0
    sheet = Image.open(tmp_path / "out.png")
    legend = sheet.crop((0, GAP + HEIGHT + GAP + LINE, *sheet.size))
    colours = {colour for pixels, colour in legend.getcolors(1 << 16) if pixels > 200}  # text and outlines have fewer
    assert [PALETTE[i] in colours for i in range(COUNT)] == [i in (1, 2, 3) for i in range(COUNT)]


def test_segformer_is_transformers_at_the_photos_size(files):
    image = read_image(photo(files))
    model = SegformerForSemanticSegmentation.from_pretrained(files / "segformer").eval()
    with torch.no_grad():
        full = F.interpolate(model(pixel_values=normalise(image[None])).logits, (HEIGHT, WIDTH), mode="bilinear")
    labels = segment(compare.load_segformer(str(files / "segformer")), image, 512)
    assert labels.shape == (HEIGHT, WIDTH) and (labels == full.argmax(1)[0]).float().mean() > 0.999
    assert labels.unique().numel() > 1


def test_both_models_see_the_same(files, monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "segment", lambda model, image, side: seen.append(side) or torch.zeros(HEIGHT, WIDTH).long())
    assert run(files, "--short-side", 32, "--out", files / "short.png") == 0
    assert seen == [32, 32]
    scales = []
    monkeypatch.setattr(compare, "segment", lambda model, *_: scales.append(model.scale) or torch.zeros(HEIGHT, WIDTH).long())
    model = segnext.load(files / "small.pth")
    model.scale = (99, 40)
    segnext.save(model, files / "scaled.pth")
    assert run(files, "--weights", files / "scaled.pth", "--out", files / "scaled.png") == 0
    assert scales == [(99, 40)] * 2


def test_differences():
    image = torch.full((3, 1, 5), 100, dtype=torch.uint8)
    theirs, ours, truth = (torch.tensor([row]) for row in ([0, 1, 0, 1, 1], [0, 0, 1, 2, 0], [2, 0, 0, 0, IGNORED]))
    shown = np.asarray(compare.difference_image(image, theirs, ours, truth))[0].tolist()
    right, wrong, neither = map(list, compare.DIFFERENCES.values())
    assert shown == [[177] * 3, right, wrong, neither, neither]


def test_differences_are_a_column(files):
    out = files / "new" / "differences.png"
    assert run(files, "--differences", "--out", out) == 0
    sheet = Image.open(out)
    image, truth = read_image(photo(files)), read_labels(mask(files)).long()
    maps = [segment(compare.load_segformer(str(files / "segformer")), image, 512)]
    maps.append(segment(segnext.load(files / "small.pth"), image, 512))
    shown = np.asarray(compare.difference_image(image, *maps, truth))
    assert (cell(sheet, 0, 3) == shown).all(-1).mean() > 0.99


def test_masks_of_data_sets():
    assert ("folder", *compare.MASKS) == look.MASKS
    table = compare._table("ade20k", 150)
    assert (table[0], table[1], table[150]) == (IGNORED, 0, 149)
    with pytest.raises(InputError, match="300 classes apart; masks hold at most 255"):
        compare._table("folder", 300)
    with pytest.raises(InputError, match="masks of cityscapes have 19 classes, the models 150"):
        compare._table("cityscapes", 150)


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({"masks": (0, 1)}, [], "--truth takes a mask for each of the 1 photographs, not 2"),
        ({"photos": (5,)}, [], "scene_5.png: no such file"),
        ({"other": "segformer_3"}, [], f"small.pth tells {COUNT} classes apart, "),
        ({"other": "no/where"}, ["--with", "segformer-b9"], "there is no model 'segformer-b9'"),
        ({}, ["--short-side", "16"], "scene_0.png: a SegFormer cannot be shown less than 32 pixels"),
        ({}, ["--dataset", "ade20k"], f"masks of ade20k have 150 classes, the models {COUNT}"),
        ({}, ["--weights", "absent.pth"], "there is no file absent.pth"),
    ],
    ids=["masks", "photo", "classes", "model", "small", "dataset", "weights"],
)
def test_errors_are_one_line(files, capsys, options, arguments, message):
    assert run(files, "--out", files / "error.png", *arguments, **options) == 2
    error = capsys.readouterr().err
    assert error.startswith("segnext: ") and message in error and error.count("\n") == 1
    assert not (files / "error.png").exists()


@pytest.mark.parametrize("window, code", [((16, 64), 2), ((64, 16), 2), ((32, 32), 0)], ids=str)
def test_windows_are_not_too_small_for_a_segformer(files, tmp_path, capsys, window, code):
    model = segnext.load(files / "small.pth")
    model.window = model.stride = window
    segnext.save(model, tmp_path / "w.pth")
    assert run(files, "--weights", tmp_path / "w.pth", "--out", tmp_path / "out.png") == code
    assert ("scene_0.png: a SegFormer cannot be shown less than 32 pixels" in capsys.readouterr().err) == bool(code)
    assert run(files, "--weights", tmp_path / "w.pth", "--short-side", 32, "--out", tmp_path / "out.png") == 0


def test_a_mask_of_another_size(files, tmp_path, capsys):
    Image.new("L", (WIDTH, HEIGHT - 1)).save(tmp_path / "mask.png")
    assert run(files, "--truth", tmp_path / "mask.png", "--out", tmp_path / "out.png") == 2
    assert "mask.png: the mask is 39x56 pixels, its image 40x56" in capsys.readouterr().err


def test_the_figure_overwrites_no_mask(files, capsys):
    before = mask(files).read_bytes()
    assert run(files, "--out", mask(files)) == 2
    assert "would be overwritten" in capsys.readouterr().err and mask(files).read_bytes() == before


def test_a_folder_that_is_no_whole_segformer(files, tmp_path):
    with pytest.raises(WeightsError, match=f"{tmp_path} cannot be loaded as a SegFormer: "):
        compare.load_segformer(str(tmp_path))
    whole = SegformerForSemanticSegmentation.from_pretrained(files / "segformer")
    state = {key: value for key, value in whole.state_dict().items() if key != "decode_head.classifier.bias"}
    whole.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(WeightsError, match=r"no whole SegFormer: decode_head\.classifier\.bias is missing"):
        compare.load_segformer(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(WeightsError, match="cannot be loaded as a SegFormer: "):
        compare.load_segformer(str(tmp_path))


def test_offline_is_one_sentence(monkeypatch):
    def unreachable(*args, **options):
        raise OSError("no connection\nsee the documentation")

    monkeypatch.setattr(SegformerForSemanticSegmentation, "from_pretrained", unreachable)
    message = r"nvidia/segformer-b2-finetuned-ade-512-512 cannot be loaded .*takes a local folder too\): no connection$"
    with pytest.raises(WeightsError, match=message):
        compare.load_segformer("segformer-b2")


def test_names_of_classes_are_those_of_their_numbers(files, tmp_path):
    """In whatever order a configuration has them."""
    shutil.copytree(files / "segformer", tmp_path / "shuffled")
    config = json.loads((tmp_path / "shuffled" / "config.json").read_text())
    config["id2label"] = dict(reversed(list(enumerate(folders.CLASSES))))
    (tmp_path / "shuffled" / "config.json").write_text(json.dumps(config))
    other = str(tmp_path / "shuffled")
    compare.compare([photo(files)], [mask(files)], files / "small.pth", tmp_path / "a.png", other=other)
    assert (tmp_path / "a.png").exists()


def test_the_same_classes_in_another_order_are_not_compared(files, tmp_path):
    other = SegformerForSemanticSegmentation.from_pretrained(files / "segformer")
    other.config.id2label = dict(enumerate(reversed(folders.CLASSES)))
    other.save_pretrained(tmp_path / "reversed")
    with pytest.raises(WeightsError, match="the same classes in another order"):
        compare.compare(
            [photo(files)], [mask(files)], files / "small.pth", tmp_path / "a.png", other=str(tmp_path / "reversed")
        )
