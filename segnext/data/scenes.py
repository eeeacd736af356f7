"""Drawn scenes with labels: an endless data set that needs no files.

Every scene has its own light, weather, palette and camera noise, and the colours of all things overlap (red trees, green cars,
lakes that mirror the sky, roads as pale as the field), so that shape, texture and place tell the classes apart, not colour.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import things
from .canvas import Canvas, colour, noise


class Scenes(Dataset):
    """Scenes that are the same whenever they are drawn with the same size, seed and index.

    Args:
        count: of scenes.
        size: (height, width) in pixels, at least 32 each.
        seed: another seed gives other scenes.

    Item: (uint8 [3, H, W], uint8 labels [H, W]); drawn in a few milliseconds when it is first asked for, and then kept.
    """

    classes = list(things.PALETTE)
    palette = list(things.PALETTE.values())

    def __init__(self, count: int, size: tuple[int, int] = (128, 160), seed: int = 0) -> None:
        if min(size) < 32:
            raise ValueError(f"scenes must be at least 32 pixels high and wide, got {size[0]}x{size[1]}")
        self.count, self.size, self.seed = count, size, seed
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"there are {self.count} scenes, no number {index}")
        if index not in self._drawn:
            canvas = Canvas(*self.size, np.random.default_rng([self.seed, index]))
            draw_scene(canvas)
            image = np.ascontiguousarray(develop(canvas).transpose(2, 0, 1))
            self._drawn[index] = torch.from_numpy(image), torch.from_numpy(canvas.labels)
        return self._drawn[index]


def draw_scene(canvas: Canvas) -> None:
    """Sky, land and the things on it, from the farthest to the nearest."""
    rng = canvas.rng
    horizon = canvas.height * rng.uniform(0.25, 0.5)
    things.sky(canvas)
    for _ in range(rng.integers(0, 3)):
        things.balloon(canvas, horizon)
    things.field(canvas, horizon)
    for index in rng.permutation(2):
        if rng.random() < 0.75:
            (things.water, things.road)[index](canvas, horizon)
    kinds = (things.tree, things.house, things.car, things.person, things.sign)
    chosen = rng.choice(len(kinds), size=rng.integers(4, 9), p=(0.2, 0.2, 0.2, 0.2, 0.2))
    for foot, kind in zip(np.sort(rng.beta(1, 1.6, len(chosen))), chosen, strict=True):  # far ones first, and more of them
        x, y = rng.uniform(0, canvas.width), horizon + 2 + foot * (canvas.height * 1.05 - horizon)
        kinds[kind](canvas, x, y, canvas.height * (0.13 + 0.36 * foot) * rng.uniform(0.85, 1.25))


def develop(canvas: Canvas) -> np.ndarray:
    """The scene through a camera: haze, coloured and uneven light, exposure, a little blur, noise; uint8 [H, W, 3]."""
    rng, image = canvas.rng, canvas.image
    height, width = canvas.height, canvas.width
    image += (colour(rng, 0.5, 1.0) - image) * (rng.uniform(0, 0.45) * (1 - canvas.y / height) ** 2)[..., None]
    light = 1 + rng.uniform(0, 0.35) * noise(rng, height, width, (height / 2, width / 2))
    image *= light[..., None] * rng.uniform(0.75, 1.2, 3).astype(np.float32)
    image = np.clip(image, 0, 1) ** np.float32(rng.uniform(0.7, 1.5))
    if rng.random() < 0.5:
        image[1:-1, 1:-1] = (
            2 * image[1:-1, 1:-1] + image[:-2, 1:-1] + image[2:, 1:-1] + image[1:-1, :-2] + image[1:-1, 2:]
        ) / 6
    image += rng.normal(0, rng.uniform(0.005, 0.06), image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
