"""``segnext predict`` from files to files, and its parts."""

from __future__ import annotations

import numpy as np
import pytest
import small
import torch
from PIL import Image

from segnext import SegNeXt, WeightsError, load, save, views
from segnext import predict as predict_module
from segnext.cli import main
from segnext.images import normalise, read_image
from segnext.palette import generated_palette
from segnext.predict import InputError, find_images, predict, seen_size, segment, unique_names
from segnext.views import View


def small_model(**attributes) -> SegNeXt:
    model = small.labelling(list("abcde"))
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    save(small_model(), path)
    return path


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("size", [(45, 70), (1, 1), (1, 33), (64, 64)], ids=str)
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_writes_overlay_mask_and_legend(tmp_path, weights, size, ending):
    small.photo(*size).save(tmp_path / f"street.{ending}")
    assert predict([tmp_path / f"street.{ending}"], weights, tmp_path / "new" / "out", short_side=0) == []
    out = tmp_path / "new" / "out"
    assert files(out) == {"street_overlay.png", "street_mask.png", "legend.png"}
    mask, shown = Image.open(out / "street_mask.png"), Image.open(out / "street_overlay.png")
    assert mask.mode == "P" and shown.mode == "RGB" and mask.size == shown.size == size[::-1]

    image = read_image(tmp_path / f"street.{ending}")
    expected = load(weights).predict(normalise(image[None]))[0]
    assert (np.asarray(mask) == expected.numpy()).mean() > 0.999
    colours = np.array(generated_palette(5))[np.asarray(mask)]
    np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), colours)
    np.testing.assert_allclose(np.asarray(shown), (image.permute(1, 2, 0).numpy() + colours) / 2, atol=1)


def test_the_small_model_tells_pictures_apart(weights):
    labels = segment(load(weights), torch.from_numpy(np.array(small.photo(64, 96))).permute(2, 0, 1), 0)
    assert labels.unique().numel() > 1


def test_exif_rotation_ends_in_the_results(tmp_path, weights):
    shown, exif = small.photo(60, 40), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    shown.save(tmp_path / "upright.png")
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    predict([tmp_path / "upright.png", tmp_path / "turned.png"], weights, tmp_path / "out")
    for kind in ("mask", "overlay"):
        upright, turned = (np.asarray(Image.open(tmp_path / "out" / f"{name}_{kind}.png")) for name in ("upright", "turned"))
        np.testing.assert_array_equal(upright, turned)


def test_names_and_colours_of_the_checkpoint(tmp_path):
    palette = [(10 * i, 200, 7) for i in range(5)]
    save(small_model(palette=palette), tmp_path / "w.safetensors")
    small.photo(32, 32).save(tmp_path / "a.png")
    predict([tmp_path / "a.png"], tmp_path / "w.safetensors", tmp_path / "out")
    found = Image.open(tmp_path / "out" / "a_mask.png").getpalette()[:15]
    assert found == [value for colour in palette for value in colour]
    colours = {colour for _, colour in Image.open(tmp_path / "out" / "legend.png").getcolors(1 << 16)}
    assert set(palette) <= colours


def test_broken_file_is_named_and_skipped(tmp_path, weights, capsys):
    small.photo(32, 32).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    small.photo(32, 32).save(tmp_path / "c.png")
    assert predict([tmp_path], weights, tmp_path / "out") == [tmp_path / "b.png"]
    assert "b.png" in capsys.readouterr().err
    assert files(tmp_path / "out") == {"legend.png", "a_mask.png", "a_overlay.png", "c_mask.png", "c_overlay.png"}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_too_large_a_picture_is_skipped(tmp_path, weights, capsys, monkeypatch, error):
    for name, side in (("large", 40), ("small", 32)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")

    def segment(model, image, *_, **__):
        if image.shape[1] == 40:
            raise error
        return torch.zeros(image.shape[1:], dtype=torch.int64)

    monkeypatch.setattr(predict_module, "segment", segment)
    assert predict([tmp_path], weights, tmp_path / "out") == [tmp_path / "large.png"]
    assert "too small; try a smaller --short-side for" in capsys.readouterr().err
    assert (tmp_path / "out" / "small_mask.png").exists()


def test_same_stems_do_not_overwrite_each_other(tmp_path, weights):
    for name, size in (("x/a.png", 32), ("x/a.bmp", 40), ("y/a.png", 48)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        small.photo(size, size).save(tmp_path / name)
    predict([tmp_path / "x", tmp_path / "y"], weights, tmp_path / "out")
    sizes = {path.name: Image.open(path).width for path in (tmp_path / "out").glob("*_mask.png")}
    assert sizes == {"a_mask.png": 40, "a_2_mask.png": 32, "a_3_mask.png": 48}


def test_names_that_would_be_too_long_are_told_before(tmp_path, weights):
    small.photo(40, 40).save(tmp_path / "a.png")
    small.photo(40, 40).save(tmp_path / f"{'x' * 244}.png")
    with pytest.raises(InputError, match="xxx.png: the names of its results would be longer than 255 bytes; rename it"):
        predict([tmp_path], weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unique_names_keep_names_that_look_numbered(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "a.jpg", "a_2.png", "a.gif", "a_2.jpg")]
    names = unique_names(paths)
    assert names == ["a", "a_3", "a_2", "a_4", "a_2_2"]


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "c.txt", ".hidden", "._b.jpg", "sub/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path / "c.txt", tmp_path, tmp_path / "a.png"])
    assert [path.name for path in found] == ["c.txt", "a.png", "b.JPG"]


@pytest.mark.parametrize(
    "inputs, message", [([], "no photographs"), (["absent.jpg"], "absent.jpg: no such"), ([""], "no image in")]
)
def test_no_inputs(tmp_path, weights, inputs, message):
    with pytest.raises(InputError, match=message):
        predict([tmp_path / name for name in inputs], weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file(tmp_path, weights):
    small.photo(32, 32).save(tmp_path / "a.png")
    with pytest.raises(NotADirectoryError, match=r"Not a directory: '.*a\.png'"):
        predict([tmp_path / "a.png"], weights, tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a_mask.png", "a_overlay.png", "legend.png"])
def test_results_never_overwrite_inputs(tmp_path, weights, name):
    small.photo(32, 32).save(tmp_path / "a.png")
    small.photo(32, 32).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match=f"{name} would be overwritten"):
        predict([tmp_path], weights, tmp_path)
    assert (tmp_path / name).read_bytes() == before and files(tmp_path) == {"a.png", name}


def test_results_do_not_come_among_the_inputs(tmp_path, weights):
    small.photo(32, 32).save(tmp_path / "a.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(tmp_path / "a.png")
    for folder in (tmp_path, tmp_path / "links"):
        with pytest.raises(InputError, match="holds photographs to look at; choose another folder for the pictures"):
            predict([folder], weights, tmp_path)
    assert files(tmp_path) == {"a.png", "links"}
    assert predict([tmp_path], weights, tmp_path / "out") == predict([tmp_path / "a.png"], weights, tmp_path) == []


def test_weights_errors_come_before_any_result(tmp_path):
    small.photo(32, 32).save(tmp_path / "a.png")
    (tmp_path / "w.pth").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"w\.pth"):
        predict([tmp_path / "a.png"], tmp_path / "w.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, message", [({"num_classes": 257}, "257 classes"), ({"in_channels": 4}, "takes 4 channels")])
def test_models_that_do_not_fit_photographs(tmp_path, changes, message):
    save(small.model(**changes), tmp_path / "w.pth")
    small.photo(32, 32).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        predict([tmp_path / "a.png"], tmp_path / "w.pth", tmp_path / "out")


def test_rank_is_passed_on(tmp_path, weights, monkeypatch):
    ranks = []
    monkeypatch.setattr(predict_module, "load", lambda path, rank: ranks.append(rank) or load(path, rank=rank))
    small.photo(32, 32).save(tmp_path / "a.png")
    predict([tmp_path / "a.png"], weights, tmp_path / "out", rank=3)
    assert ranks == [3]


def test_scale_is_the_checkpoints_unless_given(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(views, "normalise", lambda images: shown.append(tuple(images.shape[-2:])) or normalise(images))
    small.photo(520, 780).save(tmp_path / "a.png")
    for trained, given in (((400, 96), None), ((96, 96), None), (None, None), ((96, 96), 0), ((96, 96), 40)):
        save(small_model(scale=trained), tmp_path / "w.pth")
        predict([tmp_path / "a.png"], tmp_path / "w.pth", tmp_path / "out", short_side=given)
    assert shown == [(96, 144), (64, 96), (512, 768), (520, 780), (40, 60)]


@pytest.mark.parametrize("size", [(520, 780), (48, 64), (33, 200), (1, 1)], ids=str)
def test_a_model_sees_what_it_saw_in_evaluation(size):
    for scale in ((400, 96), (96, 96)):
        assert seen_size(small_model(scale=scale), torch.empty(3, *size)) == View(scale).size(size)


def test_long_pictures_are_bounded_too():
    assert seen_size(small_model(), torch.empty(3, 500, 20000), None) == (51, 2048)
    assert seen_size(small_model(), torch.empty(3, 500, 20000), 100) == (10, 400)
    assert seen_size(small_model(), torch.empty(3, 1, 10**6, dtype=torch.uint8), None) == (1, 2048)


@pytest.mark.parametrize("short_side, seen", [(0, (90, 121)), (8, (8, 11)), (32, (32, 43)), (90, (90, 121)), (512, (90, 121))])
def test_short_side_bounds_what_the_model_sees(short_side, seen):
    model, sizes = small_model(), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    labels = segment(model, torch.zeros(3, 90, 121, dtype=torch.uint8), short_side)
    assert sizes == [seen] and labels.shape == (90, 121)


@pytest.mark.parametrize("short_side", [1, 7])
def test_short_sides_that_are_too_small(tmp_path, weights, short_side):
    small.photo(32, 32).save(tmp_path / "a.png")
    message = f"a short side of {short_side} is neither 0 nor at least 8 pixels"
    with pytest.raises(InputError, match=message):
        segment(small_model(), torch.zeros(3, 40, 40, dtype=torch.uint8), short_side)
    with pytest.raises(InputError, match=message):
        predict([tmp_path / "a.png"], weights, tmp_path / "out", short_side=short_side)
    assert not (tmp_path / "out").exists()


def test_windows_of_the_checkpoint(tmp_path):
    """A picture is shown as evaluation by the recipe shows it, and whole where a short side is given."""
    picture = torch.from_numpy(np.array(small.photo(90, 121))).permute(2, 0, 1)
    save(small_model(scale=(96, 64), multiple=8, window=(32, 40), stride=(20, 24)), tmp_path / "w.pth")
    model = load(tmp_path / "w.pth")
    assert (model.scale, model.multiple, model.window, model.stride) == ((96, 64), 8, (32, 40), (20, 24))
    for flags in ({}, {"multi_scale": True}, {"flip": True}):
        view = View((96, 64), 8, (32, 40), (20, 24), views.MULTI_SCALE if "multi_scale" in flags else (1.0,), "flip" in flags)
        assert torch.equal(segment(model, picture, **flags), views.label_map(model, picture, view))
    assert torch.equal(segment(model, picture, 50), views.label_map(model, picture, View((200, 50))))


@pytest.mark.parametrize(
    ("options", "view"),
    [
        ("", View((96, 64), 8, (32, 40), (20, 24))),
        ("--multiple 1", View((96, 64), 1, (32, 40), (20, 24))),
        ("--scale 80x60 --window none", View((80, 60), 8)),
        ("--scale 60x60 --window 60x60 --stride 60x60", View((60, 60), 8, (60, 60), (60, 60))),
        ("--scale none --window 40x40 --stride 40x40", View((96, 64), 8, (40, 40), (40, 40))),
    ],
)
def test_pictures_are_shown_as_asked(tmp_path, monkeypatch, capsys, options, view):
    save(small_model(scale=(96, 64), multiple=8, window=(32, 40), stride=(20, 24)), tmp_path / "w.pth")
    small.photo(90, 121).save(tmp_path / "a.png")
    views_seen = []

    def label_map(model, image, view):
        views_seen.append(view)
        return torch.zeros(image.shape[1:], dtype=torch.int64)

    monkeypatch.setattr(predict_module, "label_map", label_map)
    place = [str(tmp_path / name) for name in ("a.png", "w.pth", "out")]
    assert main(["predict", place[0], "--weights", place[1], "--out", place[2], *options.split()]) == 0
    assert views_seen == [view] and "does not say" not in capsys.readouterr().out
    assert main(["predict", place[0], "--weights", place[1], "--out", place[2], "--short-side", "50", "--window", "none"]) == 2
    assert "--short-side shows photographs whole and at that size; it goes without --window" in capsys.readouterr().err
    save(small_model(), tmp_path / "w.pth")
    assert main(["predict", place[0], "--weights", place[1], "--out", place[2]]) == 0
    assert "w.pth does not say at which scale it was trained" in capsys.readouterr().out


def test_pictures_larger_than_cut_ones_keep_their_size():
    model, sizes = small_model(scale=(48, 48), window=(48, 48), stride=(32, 32)), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    segment(model, torch.zeros(3, 90, 121, dtype=torch.uint8))
    assert sizes == [(48, 48)] * 3 * 4
    sizes.clear()
    segment(model, torch.zeros(3, 24, 20, dtype=torch.uint8))
    assert sizes == [(48, 40)]


@pytest.mark.parametrize(("option", "view"), [("--flip", View(flip=True)), ("--multi-scale", View(ratios=views.MULTI_SCALE))])
def test_options_of_the_command(tmp_path, weights, monkeypatch, option, view):
    small.photo(40, 60).save(tmp_path / "a.png")
    seen, place = [], ("--weights", str(weights), "--out", str(tmp_path / "out"))
    monkeypatch.setattr(predict_module, "label_map", lambda model, image, view: seen.append(view) or torch.zeros(40, 60).long())
    assert main(["predict", str(tmp_path / "a.png"), *place, "--short-side", "0", "--alpha", "0", option]) == 0
    assert seen == [view]
    np.testing.assert_array_equal(Image.open(tmp_path / "out" / "a_overlay.png"), Image.open(tmp_path / "a.png"))
