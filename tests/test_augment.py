"""Augmentation: picture and labels move together, as far as the recipe says."""

from __future__ import annotations

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from segnext.data.augment import FILL, FillUp, RandomScaleCrop, _source, augmentation, fit_factor, photometric_distortion


def coordinates(height: int, width: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """A picture whose red is x and green is y (64 levels each), and labels that say in which of 8x8 fields a pixel lies."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    image = torch.stack([x * 256, y * 256, torch.full_like(x, 77)]).to(torch.uint8)
    return tv_tensors.Image(image), tv_tensors.Mask(((y * 8).long() * 8 + (x * 8).long()).to(torch.uint8))


def fields(image: torch.Tensor) -> torch.Tensor:
    """The labels that a picture made by :func:`coordinates` shows."""
    return (image[1].long() // 32) * 8 + image[0].long() // 32


@pytest.mark.parametrize("size", [(60, 80), (80, 60), (37, 301), (200, 200)], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_labels_follow_the_picture(size, flip):
    torch.manual_seed(1)
    image, labels = coordinates(*size)
    augment, agree, scales = augmentation((64, 96), (160, 80), distort=False), [], []
    for _ in range(40):
        new_image, new_labels = augment(image, labels)
        assert new_image.shape == (3, 64, 96) and new_labels.shape == (64, 96) and new_labels.dtype == torch.uint8
        known = new_labels != 255
        red = new_image[0].float()
        if (red[0, known[0]].diff().mean() < 0) != flip:
            continue
        if flip:  # the place of a pixel is then counted from the other side
            agree.append((fields(new_image.flip(2))[known.flip(1)] == new_labels.flip(1)[known.flip(1)]).float().mean().item())
        else:
            agree.append((fields(new_image)[known] == new_labels[known]).float().mean().item())
        scales.append(256 / size[1] / red[0, known[0]].diff().abs().mean().item())
    assert len(agree) > 5 and sum(agree) / len(agree) > 0.93
    factor = min(160 / max(size), 80 / min(size))
    assert 0.45 * factor < min(scales) < 0.9 * factor and 1.3 * factor < max(scales) < 2.2 * factor


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_the_seen_part_is_what_resizing_the_whole_picture_shows(ratio):
    """The part alone is resized: at its borders it lacks neighbours, and its place is a whole pixel of the source."""
    torch.manual_seed(0)
    image, labels = coordinates(120, 160)
    for _ in range(5):
        part, _ = RandomScaleCrop((64, 64), (160, 120), (ratio, ratio), 1.0)(image, labels)
        wide = int(min(64, 160 * ratio))
        red = part[0, 2:40, 2 : wide - 2].float()
        assert torch.allclose(red.diff(dim=1).mean(), torch.tensor(256 / (160 * ratio)), rtol=0.08)
        assert red.std(0).max() < 1


def test_small_pictures_are_filled_up():
    """With what is zero for the network, whatever happens to the colours."""
    image, labels = coordinates(20, 30)
    for _ in range(8):
        part, seen = augmentation((64, 80), (30, 20), (1.0, 1.0))(image, labels)
        assert part[:, 20:].flatten(1).unique(dim=1).flatten().tolist() == list(FILL) and (seen[:, 30:] == 255).all()
    part, seen = v2.Compose([RandomScaleCrop((64, 80), (30, 20), (1.0, 1.0)), FillUp((64, 80))])(image, labels)
    assert torch.equal(part[:, :20, :30], image) and torch.equal(seen[:20, :30], labels)
    assert (seen[20:] == 255).all() and (seen[:, 30:] == 255).all()
    assert part[:, 20:].flatten(1).unique(dim=1).flatten().tolist() == list(FILL) == [124, 116, 104]


def test_one_pixel():
    part, seen = augmentation((32, 32), (64, 32))(tv_tensors.Image(torch.zeros(3, 1, 1, dtype=torch.uint8)), zeros(1, 1))
    assert part.shape == (3, 32, 32) and seen.shape == (32, 32)


def zeros(*size: int) -> tv_tensors.Mask:
    return tv_tensors.Mask(torch.zeros(size, dtype=torch.uint8))


def test_crops_of_one_class_are_avoided():
    """A small square of class 1 in a field of class 0: a crop that shows too much field is drawn again."""
    labels = zeros(200, 200)
    labels[80:120, 80:120] = 1
    labels[:, :10] = 255
    image = tv_tensors.Image(labels.expand(3, -1, -1).contiguous())
    torch.manual_seed(0)
    shares = {}
    for max_share in (1.0, 0.75):
        crop = RandomScaleCrop((50, 50), (200, 200), (1.0, 1.0), max_share)
        seen = [crop(image, labels)[1] for _ in range(60)]
        shares[max_share] = sum(((part == 0).sum() < 0.75 * (part != 255).sum()).item() for part in seen) / len(seen)
    assert shares[0.75] > 0.6 > 4 * shares[1.0]


@pytest.mark.parametrize(
    "labels, mixed",
    [([0, 1], True), ([0, 0, 0, 1], False), ([0, 0, 255, 255], False), ([0, 1, *[255] * 10], True), ([255], False)],
    ids=str,
)
def test_ignored_pixels_are_no_class(labels, mixed):
    crop = augmentation((1, 1), (1, 1)).transforms[0]
    assert crop._is_mixed(torch.tensor([labels]), 0, 1, 0, len(labels)) == mixed


def test_the_largest_share_is_the_recipes():
    assert augmentation((32, 32), (64, 32), max_share=0.3).transforms[0].max_share == 0.3


def test_every_place_is_drawn():
    labels = tv_tensors.Mask(torch.arange(9).view(3, 3))
    torch.manual_seed(0)
    corners = {RandomScaleCrop((2, 2), (3, 3), (1.0, 1.0), 1.0)(labels)[0, 0].item() for _ in range(50)}
    assert corners == {0, 1, 3, 4}


def test_the_pixels_that_a_part_shows():
    assert [_source(start, 1, 3, 5) for start in range(3)] == [(0, 2), (1, 3), (3, 5)]
    assert [_source(start, 2, 5, 3) for start in range(4)] == [(0, 1), (0, 2), (1, 2), (1, 3)]


def test_small_pictures_are_means_of_large_ones():
    """Where pixels alone are picked, a checkerboard at a third of its size is one again."""
    checkers = (torch.arange(96)[:, None] + torch.arange(96)) % 2 * 255
    image = tv_tensors.Image(checkers.expand(3, -1, -1).to(torch.uint8))
    small = RandomScaleCrop((32, 32), (32, 32), (1.0, 1.0), 1.0)(image)
    assert small.shape == (3, 32, 32) and small.min() > 110 and small.max() < 145


def test_distortion_changes_colours_only():
    torch.manual_seed(0)
    image, labels = coordinates(32, 32)
    results = [photometric_distortion()(image, labels) for _ in range(100)]
    assert all(torch.equal(new_labels, labels) for _, new_labels in results)
    assert all(new_image.shape == image.shape and new_image.dtype == torch.uint8 for new_image, _ in results)
    unchanged = sum(torch.equal(new_image, image) for new_image, _ in results)
    assert 0 < unchanged < 20  # of four changes each happens in half of the pictures


def test_distortion_keeps_within_its_amounts():
    """Of a grey only the brightness changes, by a quarter at most; of a red the hue, not as far as to yellow or violet."""
    torch.manual_seed(0)
    grey, red = (tv_tensors.Image(torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)) for colour in ([128] * 3, [200, 0, 0]))
    levels = [photometric_distortion()(grey)[0].item() for _ in range(100)]
    assert 94 <= min(levels) < 105 and 150 < max(levels) <= 161
    others = [photometric_distortion()(red).flatten().tolist() for _ in range(100)]
    assert all(red > max(rest) for red, *rest in others)


@pytest.mark.parametrize(
    "size, scale, factor", [((512, 1024), (2048, 512), 1), ((100, 1000), (2048, 512), 2.048), ((400, 200), (520, 520), 1.3)]
)
def test_fit_factor(size, scale, factor):
    assert fit_factor(size, scale) == fit_factor(size[::-1], scale) == pytest.approx(factor)
