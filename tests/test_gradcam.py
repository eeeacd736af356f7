"""Grad-CAM's maps against autograd by hand, and ``segnext gradcam`` from files to a figure."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import convnext_tiny

import segnext
from segnext import Classifier, WeightsError, cli, gradcam
from segnext.cli import look
from segnext.figure import GAP, LINE, figure
from segnext.gradcam import find_class, heat_map, imagenet_classes
from segnext.images import normalise
from segnext.predict import InputError, segment

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ["sky", "road", "car", "cable car", "tree", "person", "traffic light"]
WIDTH = 40
CONVNEXT = ("--compare", "convnext_tiny", "--compare-weights")


def picture(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.from_numpy(np.array(small.photo(height, width))).permute(2, 0, 1)


def segmenter(**changes) -> segnext.SegNeXt:
    model = small.labelling(CLASSES, **changes)
    model.scale = (96, 64)  # that of the pictures here
    return model


def classifier(num_classes: int = 7) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(small.model(num_classes=num_classes).config).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def stretched(map_: torch.Tensor) -> torch.Tensor:
    return (map_ - map_.min()) / (map_.max() - map_.min())


def scaled(map_: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The map's positive part [h, w], upsampled to a size and stretched to 0..1."""
    return stretched(F.interpolate(stretched(F.relu(map_))[None, None], size, mode="bilinear")[0, 0])


def by_hand(activations: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """sum_k mean_xy(dS / dA_k) * A_k of activations [1, K, h, w]."""
    (gradient,) = torch.autograd.grad(score, activations)
    return (gradient.mean((2, 3), keepdim=True) * activations).sum(1)[0].detach()


def record(module: torch.nn.Module) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return outputs


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_segmentation_map_by_hand(stage):
    """S is summed over the upsampled logits of the label's pixels."""
    model, image = segmenter(), picture()
    labels = segment(model, image, 0)
    category = int(labels.flatten().mode().values)
    found = heat_map(model, image, category, f"stage{stage}", short_side=0)
    outputs = record(getattr(model.backbone, f"norm{stage}"))
    full = F.interpolate(model(normalise(image[None])), (64, 96), mode="bilinear")
    score = full[0, category][labels == category].sum()
    torch.testing.assert_close(found, scaled(by_hand(outputs[0], score), (64, 96)), rtol=1e-3, atol=2e-4)


def test_classifier_map_is_the_head_on_the_last_map():
    """Of a mean and one linear layer Grad-CAM is the layer at every pixel."""
    model, image = classifier(), picture()
    last = model.backbone(normalise(image[None]))[-1].detach()
    torch.testing.assert_close(model(normalise(image[None])), model.head(last.mean((2, 3))))
    expected = scaled(torch.einsum("c,chw->hw", model.head.weight[3].detach(), last[0]), (64, 96))
    torch.testing.assert_close(heat_map(model, image, 3, short_side=0), expected, rtol=1e-3, atol=2e-4)


def test_head_map_is_the_logit_without_its_bias():
    model, image = segmenter(), picture()
    logits = model(normalise(image[None])).detach()[0]
    for category in segment(model, image, 0).unique().tolist():
        expected = scaled(logits[category] - model.decode_head.conv_seg.bias[category].detach(), (64, 96))
        torch.testing.assert_close(heat_map(model, image, category, "head", short_side=0), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("build", [segmenter, classifier, lambda: segmenter(head="msca")], ids=["ham", "classifier", "msca"])
def test_maps_have_the_photos_size_and_follow_class_and_layer(build):
    model, image = build(), picture(80, 72)
    maps = [heat_map(model, image, category, layer) for category in (0, 1) for layer in ("stage2", "stage4")]
    for found in maps:
        assert found.shape == (80, 72) and found.dtype == torch.float32 and found.isfinite().all()
        assert found.min() >= 0 and found.max() <= 1
    assert sum(found.max() > 0.5 for found in maps) >= 3  # a map may be all 0
    for i in range(4):
        for j in range(i):
            assert (maps[i] - maps[j]).abs().max() > 0.1, (i, j)


def test_map_of_a_large_photo_is_seen_small():
    model, image = segmenter(), picture(128, 192)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    assert heat_map(model, image, 0, short_side=64).shape == (128, 192)
    assert set(sizes) == {(64, 96)}


def test_pictures_are_looked_at_whole():
    model, image = segmenter(), picture()
    labels = segment(model, image)
    expected = [heat_map(model, image, category) for category in range(7)]
    model.window = model.stride = (32, 32)
    y, x = (segment(model, image) != labels).nonzero()[0].tolist()
    assert gradcam._category(model, CLASSES, image, Path("a.png"), None, (x, y), None) == labels[y, x]
    assert all(torch.equal(heat_map(model, image, category), map_) for category, map_ in enumerate(expected))


def test_a_frozen_model_and_no_grad_change_no_map():
    model = segmenter()
    expected = heat_map(model, picture(), 1, "stage2", short_side=0)
    with torch.no_grad():
        found = heat_map(model.requires_grad_(False), picture(), 1, "stage2", short_side=0)
    assert torch.equal(found, expected) and expected.any()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_model_is_left_without_gradients_and_hooks():
    model = segmenter()
    heat_map(model, picture(), 0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def two_labels() -> torch.Tensor:
    labels = torch.zeros(20, 30, dtype=torch.int64)
    labels[2:6, 3:9] = 1
    labels[12:18, 20:28] = 1
    return labels


@pytest.mark.parametrize(
    "category, region, expected",
    [
        (1, None, lambda labels: labels == 1),
        (5, None, lambda labels: labels >= 0),
        (1, (4, 3), lambda labels: (labels == 1) & (torch.arange(30) < 15)),
        (5, (22, 13), lambda labels: (labels == 1) & (torch.arange(30) > 15)),
        (1, (5, 0, 10, 4), lambda labels: (torch.arange(20)[:, None] < 4) & (torch.arange(30) >= 5) & (torch.arange(30) < 10)),
    ],
    ids=["label", "absent", "connected", "of_another_class", "box"],
)
def test_pixels_of_a_region(category, region, expected):
    labels = two_labels()
    assert torch.equal(gradcam._mask(labels, category, region), expected(labels))


@pytest.mark.parametrize("region", [(30, 0), (0, 20), (5, 5, 5, 9), (0, 0, 31, 5)], ids=str)
def test_region_outside(region):
    with pytest.raises(InputError, match="is not inside of a picture of 30x20 pixels"):
        gradcam._mask(two_labels(), 0, region)


def test_region_changes_the_map():
    model, image = segmenter(), picture()
    left, right = (heat_map(model, image, 0, "stage1", region) for region in ((0, 0, 16, 64), (80, 0, 96, 64)))
    assert (left - right).abs().max() > 0.1


def test_masks_move_to_the_logits_as_gradients_do():
    mask = torch.rand(45, 70) > 0.5
    logits = torch.randn(1, 1, 6, 9, dtype=torch.float32)
    full = F.interpolate(logits, (45, 70), mode="bilinear")[0, 0]
    torch.testing.assert_close((gradcam._on_logits(mask, (6, 9)) * logits[0, 0]).sum(), full[mask].sum(), rtol=1e-4, atol=1e-3)


def test_convnext_map():
    torch.manual_seed(0)
    model, image = convnext_tiny(num_classes=3).eval(), picture(64, 64)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):  # or the blocks change nothing
            torch.nn.init.normal_(parameter)
    found = heat_map(model, image, 1, "stage3")
    outputs = record(model.features[5])
    score = model(normalise(image[None]))[0, 1]
    torch.testing.assert_close(found, scaled(by_hand(outputs[0], score), (64, 64)), rtol=1e-3, atol=1e-3)


def test_heat_is_blue_then_red():
    shown = np.asarray(gradcam.heat_image(torch.full((3, 1, 2), 128, dtype=torch.uint8), torch.tensor([[0.0, 1.0]])))
    assert shown[0, 0].argmax() == 2 and shown[0, 1].argmax() == 0


def test_models_and_layers_that_do_not_fit():
    image = picture()
    with pytest.raises(TypeError, match="FusedSegNeXt"):
        heat_map(segnext.fuse(segmenter()), image, 0, short_side=0)
    with pytest.raises(InputError, match="no layer head"):
        heat_map(classifier(), image, 0, "head")
    with pytest.raises(InputError, match="a region needs"):
        heat_map(classifier(), image, 0, region=(1, 1))
    with pytest.raises(InputError, match="'stage5'; there are stage1"):
        heat_map(segmenter(), image, 0, "stage5")


def test_the_command_line_knows_the_choices():
    assert look.LAYERS == gradcam.LAYERS and tuple(gradcam.CONVNEXTS) == look.CONVNEXTS


def test_find_class():
    assert [find_class(name, CLASSES) for name in ("car", " Traffic Light", "4")] == [2, 6, 4]
    assert find_class("tabby", imagenet_classes()) == 281
    for wanted, message in (
        ("cars", "no class 'cars'; near it: car"),
        ("light", "'light'; near it: traffic light"),
        ("7", "there are 7, as sky"),
    ):
        with pytest.raises(InputError, match=message):
            find_class(wanted, CLASSES)
    assert find_class("1", ["1", "2", "3"]) == 0 and find_class("2", ["a", "b", "c"]) == 2
    with pytest.raises(InputError, match="several classes are called 'crane'; give a number: 0, 2"):
        find_class("crane", ["crane", "heron", "Crane"])


def test_load_classifier(tmp_path):
    model = classifier(1000)
    state = {key.removeprefix("backbone."): value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "encoder.pth")
    loaded = segnext.load_classifier(tmp_path / "encoder.pth")
    images = normalise(picture()[None])
    assert loaded.config.num_classes == 1000
    torch.testing.assert_close(loaded(images), model(images))
    torch.save({key: value for key, value in state.items() if not key.startswith("head.")}, tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match=r"bare\.pth holds no classifier head\.weight"):
        segnext.load_classifier(tmp_path / "bare.pth")
    torch.save(state | {"head.bias": torch.zeros(3)}, tmp_path / "misfit.pth")
    with pytest.raises(WeightsError, match=r"misshapen head\.bias \[3\] instead of \[1000\]"):
        segnext.load_classifier(tmp_path / "misfit.pth")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Photos a.png and b.png, a whole model, an encoder with 1000 classes, a ConvNeXt."""
    folder = tmp_path_factory.mktemp("gradcam")
    for name, size in (("a", (64, 96)), ("b", (96, 64))):
        small.photo(*size).save(folder / f"{name}.png")
    segnext.save(segmenter(), folder / "whole.pth")
    torch.save(classifier(1000).state_dict(), folder / "encoder.pth")
    torch.manual_seed(0)
    torch.save(convnext_tiny().state_dict(), folder / "convnext.pth")
    return folder


def run(folder, *arguments) -> int:
    """``segnext gradcam`` in the folder, with narrow columns."""
    given = [str(folder / text) if str(text).endswith((".png", ".pth")) else str(text) for text in arguments]
    return cli.main(["gradcam", *given, "--width", str(WIDTH)])


def test_figure_of_two_photos_and_two_models(files, capsys):
    options = (*CONVNEXT, "convnext.pth", "--compare-class", "sports car", "--layer", "head")  # of a ConvNeXt its last stage
    code = run(files, "a.png", "b.png", "--class", "car", "--weights", "whole.pth", *options, "--out", "out.png")
    assert code == 0 and capsys.readouterr().out == f"wrote {files / 'out.png'}\n"
    sheet = Image.open(files / "out.png")
    heights = [27, 60]  # of the rows: 40 * 64 / 96 and 40 * 96 / 64
    assert sheet.size == (3 * (WIDTH + GAP) + GAP, GAP + sum(heights) + 2 * (LINE + GAP) + LINE)
    columns = [
        np.asarray(sheet.crop((x, GAP + LINE, x + WIDTH, GAP + LINE + heights[0]))).astype(int)
        for x in range(GAP, sheet.width, WIDTH + GAP)
    ]
    photo = Image.open(files / "a.png").resize((WIDTH, heights[0]), Image.Resampling.BOX)
    np.testing.assert_array_equal(columns[0], np.asarray(photo))
    assert all(abs(columns[i] - columns[j]).max() > 50 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_figure_shows_the_map_of_the_class_in_its_row(files):
    model, image = segnext.load(files / "whole.pth"), picture()
    present = segment(model, image, 512).unique().tolist()
    options = ("--weights", "whole.pth", "--layer", "stage2", "--out", "rows.png")
    classes = (present[0], present[1])
    assert run(files, "a.png", "b.png", "--class", classes[0], "--class", classes[1], *options) == 0
    sheet = Image.open(files / "rows.png")
    shown = gradcam.heat_image(image, heat_map(model, image, classes[0], "stage2")).resize((WIDTH, 27), Image.Resampling.BOX)
    left = 2 * GAP + WIDTH
    np.testing.assert_array_equal(np.asarray(sheet.crop((left, GAP + LINE, left + WIDTH, GAP + LINE + 27))), np.asarray(shown))


def test_a_row_for_every_class_of_one_photo(files, monkeypatch):
    drawn = Mock(wraps=figure)
    monkeypatch.setattr(gradcam, "figure", drawn)
    assert run(files, "a.png", "--class", "sky", "--class", "car", "--weights", "whole.pth", "--out", "classes.png") == 0
    assert Image.open(files / "classes.png").height == GAP + 2 * (LINE + 27 + GAP) + LINE
    assert drawn.call_args.kwargs["titles"] == ["sky", "car"]


def test_the_short_side_of_the_command_is_what_the_model_sees(files, monkeypatch):
    model, sizes = segmenter(), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    monkeypatch.setattr(gradcam, "_load", lambda *args: model)
    options = ("--class", "car", "--weights", "whole.pth", "--short-side", "32", "--out", "short.png")
    assert run(files, "a.png", *options) == 0 and set(sizes) == {(32, 48)}


def test_encoder_as_classifier(files):
    options = ("--weights", "encoder.pth", *CONVNEXT, "convnext.pth")
    assert run(files, "a.png", "--class", "tabby", *options, "--out", "encoder.png") == 0
    assert Image.open(files / "encoder.png").width == 3 * (WIDTH + GAP) + GAP


def test_a_pixels_class_is_the_default(files, monkeypatch):
    seen = []
    real = gradcam.heat_map
    monkeypatch.setattr(gradcam, "heat_map", lambda *args: seen.append((args[2], args[4])) or real(*args))
    assert run(files, "a.png", "--region", "50,20", "--weights", "whole.pth", "--out", "pixel.png") == 0
    assert seen == [(int(segment(segnext.load(files / "whole.pth"), picture(), 512)[20, 50]), (50, 20))]


def test_an_absent_class_is_said(files, capsys):
    absent = sorted(set(range(7)) - set(segment(segnext.load(files / "whole.pth"), picture(), 512).unique().tolist()))[0]
    assert run(files, "a.png", "--class", absent, "--weights", "whole.pth", "--out", "said.png") == 0
    assert f"no pixel is labelled {CLASSES[absent]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a.png", "--class", "cat", "--weights", "whole.pth"], "no class 'cat'; near it: car"),
        (["a.png", "--weights", "whole.pth"], "give a class (--class NAME)"),
        (["a.png", "--region", "1,1", "--weights", "encoder.pth"], "give a class"),
        (["a.png", "--class", "tabby", "--region", "1,1", "--weights", "encoder.pth"], "a region needs a model that segments"),
        (["a.png", "--class", "car", "--region", "96,1", "--weights", "whole.pth"], "a.png: the region 96,1 is not inside"),
        (
            ["a.png", "b.png", *["--class", "1"] * 3, "--weights", "whole.pth"],
            "one photograph for all of them or 3, not 2",
        ),
        (["absent.png", "--class", "car", "--weights", "whole.pth"], "absent.png: no such file"),
        (["a.png", "--class", "car", "--weights", "absent.pth"], "absent.pth"),
        (["a.png", "--class", "car", "--weights", "whole.pth", "--compare-class", "cab"], "go with --compare"),
        (["a.png", "--class", "car", "--weights", "whole.pth", *CONVNEXT[2:], "convnext.pth"], "go with --compare"),
        (["a.png", "--class", "car", "--weights", "convnext.pth"], "convnext.pth holds no classifier head.weight"),
        (["a.png", "--class", "car", "--weights", "whole.pth", *CONVNEXT, "whole.pth"], "whole.pth holds no ConvNeXt"),
        (["a.png", "--class", "sky", "--weights", "whole.pth", *CONVNEXT, "convnext.pth"], "(--compare-class): there is no"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_errors_are_one_line(files, capsys, arguments, message):
    assert run(files, *arguments, "--out", "error.png") == 2
    error = capsys.readouterr().err
    assert error.startswith("segnext: ") and message in error and error.count("\n") == 1
    assert not (files / "error.png").exists()


def test_a_folder_that_is_a_file_is_told_before_any_map(files, capsys, monkeypatch):
    monkeypatch.setattr(gradcam, "heat_map", None)
    (files / "folder.png").mkdir()
    for out, message in (("whole.pth/heat.png", "[Errno 20] Not a directory: "), ("folder.png", "is a folder; name a file")):
        assert run(files, "a.png", "--class", "car", "--weights", "whole.pth", "--out", out) == 2
        assert message in capsys.readouterr().err


def test_a_model_of_four_channels(files, tmp_path):
    segnext.save(segmenter(in_channels=4), tmp_path / "w.pth")
    with pytest.raises(InputError, match="takes 4 channels; photographs have 3"):
        gradcam.gradcam([files / "a.png"], tmp_path / "w.pth", tmp_path / "out.png", ["car"])


def test_the_figure_overwrites_no_photo(files, capsys):
    before = (files / "a.png").read_bytes()
    assert run(files, "a.png", "--class", "car", "--weights", "whole.pth", "--out", "a.png") == 2
    assert "a.png would be overwritten" in capsys.readouterr().err and (files / "a.png").read_bytes() == before
    assert cli.main(["gradcam", "a.png", "--class", "car", "--weights", "w.pth", "--out", "a.jpg"]) == 2


def test_offline_is_one_line(files, capsys, monkeypatch, tmp_path):
    def unreachable(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    options = ("--weights", "whole.pth", "--compare", "convnext_tiny", "--out", "error.png")
    assert run(files, "a.png", "--class", "car", *options) == 2
    *_, last = capsys.readouterr().err.splitlines()  # torch.hub tells first what it fetches
    assert last.startswith("segnext: cannot fetch https://download.pytorch.org/models/convnext_tiny-")
    assert last.endswith("no route to host; --compare-weights takes a file that you have")


@pytest.mark.parametrize("region", ["5", "1,2,3", "a,b", "-1,2"])
def test_regions_of_another_form(region, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["gradcam", "a.png", "--weights", "w", "--out", "o.png", f"--region={region}"])
    assert ended.value.code == 2 and "is neither X,Y nor LEFT,TOP,RIGHT,BOTTOM" in capsys.readouterr().err


def test_figure_keeps_shapes_and_makes_room_for_what_is_below():
    red, blue = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (10, 20), "blue")
    sheet = figure([[red, red], [blue, blue]], ["a", "b"], 0, below=Image.new("RGB", (200, 5), "green"))
    assert sheet.size == (200, GAP + 20 + GAP + 60 + GAP + LINE + 5 + GAP)
    assert sheet.getpixel((GAP + 29, GAP + 19)) == (255, 0, 0) and sheet.getpixel((GAP + 30 + GAP, 2 * GAP + 79)) == (0, 0, 255)
    assert sheet.getpixel((0, sheet.height - GAP - 1)) == (0, 128, 0)
