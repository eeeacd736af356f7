"""How pictures are shown to a model in evaluation: sizes, windows, scales and flips, against plain loops."""

from __future__ import annotations

import pytest
import small
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional

from segnext.images import normalise
from segnext.views import MULTI_SCALE, View, label_map
from segnext.windows import windows


def picture(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    return (F.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1) * 255).to(torch.uint8)


MODEL = small.model()


@torch.no_grad()
def logits(image: torch.Tensor, size: tuple[int, int], seen: tuple[int, int] | None = None) -> torch.Tensor:
    image = image[None] if seen is None else functional.resize(image[None], list(seen), antialias=True)
    return F.interpolate(MODEL(normalise(image)), size, mode="bilinear")


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a == b).float().mean().item()


@pytest.mark.parametrize(
    "view, size, seen",
    [
        (View(), (47, 61), (47, 61)),
        (View((2048, 512)), (400, 600), (512, 768)),
        (View((2048, 512)), (100, 1000), (205, 2048)),
        (View((520, 520)), (400, 200), (520, 260)),
        (View((2048, 512), multiple=32), (400, 601), (512, 800)),  # 512 x 769.3
        (View(multiple=32), (1, 33), (32, 64)),
        (View((64, 64)), (1, 1000), (1, 64)),
    ],
    ids=str,
)
def test_sizes(view, size, seen):
    assert view.size(size) == seen and view.size(size[::-1]) == seen[::-1]


def test_sizes_of_other_ratios():
    assert [View((2048, 512), 32).size((512, 683), ratio) for ratio in MULTI_SCALE] == [
        (256, 352), (384, 512), (512, 704), (640, 864), (768, 1056), (896, 1216)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "size, window, stride, starts",
    [
        (2048, 1024, 768, [0, 768, 1024]),
        (1024, 1024, 768, [0]),
        (700, 896, 512, [0]),
        (520, 480, 320, [0, 40]),
        (7, 3, 2, [0, 2, 4]),
    ],
)
def test_windows(size, window, stride, starts):
    assert windows(size, window, stride) == [slice(start, start + min(window, size)) for start in starts]


@pytest.mark.parametrize("size", [(47, 61), (1, 1), (64, 32)], ids=str)
def test_whole(size):
    image = picture(*size)
    assert torch.equal(label_map(MODEL, image, View()), logits(image, size).argmax(1)[0])
    view = View((96, 48), multiple=16)
    expected = logits(image, size, view.size(size)).argmax(1)[0]
    assert label_map(MODEL, image, view).shape == size and agreement(label_map(MODEL, image, view), expected) > 0.99


@pytest.mark.parametrize("window", [(48, 64), (100, 200)], ids=str)
def test_a_window_that_covers_the_picture_is_the_whole(window):
    image = picture(48, 64)
    assert torch.equal(label_map(MODEL, image, View(window=window, stride=(32, 32))), label_map(MODEL, image, View()))


@pytest.mark.parametrize("size, window, stride", [((48, 80), (32, 32), (16, 24)), ((30, 90), (64, 64), (64, 64))], ids=str)
def test_sliding_window(size, window, stride):
    image = picture(*size)
    total, count = torch.zeros(1, 7, *size), torch.zeros(1, 1, *size)
    for y in range(0, max(size[0] - window[0], 0) + stride[0], stride[0]):
        for x in range(0, max(size[1] - window[1], 0) + stride[1], stride[1]):
            bottom, right = min(y + window[0], size[0]), min(x + window[1], size[1])
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            part = image[:, top:bottom, left:right]
            total[:, :, top:bottom, left:right] += logits(part, part.shape[1:])
            count[:, :, top:bottom, left:right] += 1
    labels = label_map(MODEL, image, View(window=window, stride=stride))
    assert agreement(labels, (total / count).argmax(1)[0]) > 0.999
    assert agreement(labels, label_map(MODEL, image, View())) < 0.999  # windows see less than the whole


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", [None, (40, 40)])
@pytest.mark.parametrize("loud", [1, 1e4], ids=["", "logits whose exponentials are infinite"])
def test_multi_scale_and_flip(flip, window, loud, monkeypatch):
    for name, parameter in list(MODEL.decode_head.conv_seg.named_parameters()):
        monkeypatch.setitem(MODEL.decode_head.conv_seg._parameters, name, torch.nn.Parameter(loud * parameter))
    size, scale, ratios = (50, 70), (96, 48), (0.5, 1.0, 1.75)
    image, total = picture(*size), torch.zeros(1, 7, *size)
    view = View(scale, 8, window, window and (40, 40), ratios, flip)
    for ratio in ratios:
        for mirrored in (False, True)[: 1 + flip]:
            shown = image.flip(2) if mirrored else image
            if window is None:
                full = logits(shown, size, view.size(size, ratio))
            else:
                full = windowed(functional.resize(shown[None], list(view.size(size, ratio)), antialias=True)[0], 40, size)
            full = full.softmax(1)
            total += full.flip(3) if mirrored else full
    assert agreement(label_map(MODEL, image, view), total.argmax(1)[0]) > 0.995


def windowed(image: torch.Tensor, window: int, size: tuple[int, int]) -> torch.Tensor:
    total, count = torch.zeros(1, 7, *image.shape[1:]), torch.zeros(1, 1, *image.shape[1:])
    for rows in windows(image.shape[1], window, window):
        for columns in windows(image.shape[2], window, window):
            part = image[:, rows, columns]
            total[:, :, rows, columns] += logits(part, part.shape[1:])
            count[:, :, rows, columns] += 1
    return F.interpolate(total / count, size, mode="bilinear")


def test_a_mirrored_picture_gives_mirrored_labels():
    image, view = picture(40, 56), View(flip=True)
    assert agreement(label_map(MODEL, image.flip(2), view).flip(1), label_map(MODEL, image, view)) > 0.999
