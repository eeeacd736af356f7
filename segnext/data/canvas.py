"""What drawn scenes are made with: a picture with labels, smooth noise, colours."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class Canvas:
    """A picture under way: float32 colours [H, W, 3] in 0..1, labels uint8 [H, W], and the source of all randomness."""

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.height, self.width, self.rng = height, width, rng
        self.image = np.zeros((height, width, 3), np.float32)
        self.labels = np.zeros((height, width), np.uint8)
        self.y, self.x = np.mgrid[:height, :width].astype(np.float32)

    def window(self, top: float, left: float, bottom: float, right: float) -> tuple[slice, slice]:
        """The part of the picture that a thing within these bounds can touch."""
        rows = slice(max(0, int(top)), max(0, min(self.height, int(bottom) + 2)))
        return rows, slice(max(0, int(left)), max(0, min(self.width, int(right) + 2)))

    def paint(self, window: tuple[slice, slice], inside: np.ndarray, colour: np.ndarray, label: int | None = None) -> None:
        """Puts a colour ([3] or of the window's size) where ``inside`` holds; without a label it only decorates."""
        part = self.image[window]
        part[inside] = np.broadcast_to(colour, part.shape)[inside]
        if label is not None:
            self.labels[window][inside] = label

    def shade(self, window: tuple[slice, slice], inside: np.ndarray, light: float) -> None:
        self.image[window][inside] *= light


@lru_cache(maxsize=256)
def _interpolation(length: int, cells: int) -> np.ndarray:
    """The matrix [length, cells] of linear interpolation between equally spaced points."""
    place = np.linspace(0, cells - 1, length)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells))).astype(np.float32)


def noise(rng: np.random.Generator, height: int, width: int, cell: tuple[float, float]) -> np.ndarray:
    """Smooth noise [height, width] in -1..1 with bumps of about ``cell`` = (height, width) pixels."""
    rows, columns = (max(2, min(n, round(n / c) + 1)) for n, c in zip((height, width), cell, strict=True))
    grid = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    return _interpolation(height, rows) @ grid @ _interpolation(width, columns).T


def colour(rng: np.random.Generator, low: float = 0.1, high: float = 0.95) -> np.ndarray:
    return rng.uniform(low, high, 3).astype(np.float32)


def earth(rng: np.random.Generator) -> np.ndarray:
    """What grass, soil, leaves, stone and asphalt are like: of any hue, seldom bright."""
    base = np.array([(0.3, 0.5, 0.15), (0.55, 0.45, 0.25), (0.45, 0.45, 0.45), (0.7, 0.6, 0.3), (0.6, 0.3, 0.15)], np.float32)
    return np.clip(base[rng.integers(len(base))] * rng.uniform(0.5, 1.4) + rng.normal(0, 0.07, 3), 0.03, 0.95).astype(
        np.float32
    )
