"""The things in drawn scenes. Each function draws one, with its label, at a random look; x, y is where it stands."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, colour, earth, noise

PALETTE = {
    "sky": (135, 190, 235),
    "field": (150, 190, 80),
    "road": (110, 110, 120),
    "water": (30, 90, 200),
    "tree": (20, 105, 45),
    "house": (190, 110, 60),
    "car": (215, 30, 40),
    "person": (250, 220, 30),
    "sign": (240, 120, 210),
    "balloon": (130, 40, 170),
}
SKY, FIELD, ROAD, WATER, TREE, HOUSE, CAR, PERSON, SIGN, BALLOON = range(len(PALETTE))


def sky(canvas: Canvas) -> None:
    rng, height, width = canvas.rng, canvas.height, canvas.width
    top, bottom = colour(rng, 0.3), colour(rng, 0.45, 1.0)
    canvas.image[:] = top + (bottom - top) * (canvas.y / height)[..., None]
    stretch = rng.uniform(1.5, 4)
    cell = height * rng.uniform(0.08, 0.25)
    clouds = noise(rng, height, width, (cell, cell * stretch)) + 0.5 * noise(rng, height, width, (cell / 3, cell / 3 * stretch))
    cover = np.clip((clouds - rng.uniform(-0.3, 0.8)) * rng.uniform(1, 5), 0, 1)[..., None] * rng.uniform(0.3, 0.9)
    canvas.image += (colour(rng, 0.5, 1.0) - canvas.image) * cover
    canvas.labels[:] = SKY


def field(canvas: Canvas, horizon: float) -> None:
    rng, height, width = canvas.rng, canvas.height, canvas.width
    edge = horizon + noise(rng, 1, width, (1, width * rng.uniform(0.1, 0.5))) * height * rng.uniform(0.0, 0.08)
    inside = canvas.y > edge
    depth = np.clip((canvas.y - horizon) / (height - horizon), 0, 1)
    patches = noise(rng, height, width, (height / 12, width / 4))
    blades = noise(rng, height, width, (2, 1.2)) * (0.1 + 0.25 * depth) * rng.uniform(0.4, 1.2)
    first, second = earth(rng), earth(rng)
    mix = np.clip(0.5 + patches * rng.uniform(0.2, 1.5), 0, 1)[..., None] * rng.uniform(0.2, 1)
    canvas.paint(np.s_[:, :], inside, (first + (second - first) * mix) * (1 + blades[..., None]), FIELD)


def water(canvas: Canvas, horizon: float) -> None:
    """A lake that mirrors the sky, with flat ripples."""
    rng, height, width = canvas.rng, canvas.height, canvas.width
    top = horizon + (height - horizon) * rng.uniform(0.02, 0.5)
    tall = (height - horizon) * rng.uniform(0.15, 0.5)
    middle, half = rng.uniform(0, width), width * rng.uniform(0.3, 0.9)
    shore = noise(rng, height, width, (height / 6, width / 8)) * 0.35
    inside = ((canvas.x - middle) / half) ** 2 + ((canvas.y - top - tall / 2) / (tall / 2)) ** 2 + shore < 1
    inside &= canvas.y > horizon + 1
    mirror = canvas.image[np.clip(2 * horizon - np.arange(height), 0, horizon).astype(int)]
    ripples = noise(rng, height, width, (1.5, rng.uniform(8, 20))) * rng.uniform(0.08, 0.25)
    tint = colour(rng, 0.2, 0.8)
    canvas.paint(np.s_[:, :], inside, (0.65 * mirror + 0.35 * tint) * rng.uniform(0.6, 1) * (1 + ripples[..., None]), WATER)


def road(canvas: Canvas, horizon: float) -> None:
    """A road that bends towards the horizon, with fine grain, and with or without lines."""
    rng, height, width = canvas.rng, canvas.height, canvas.width
    depth = np.clip((canvas.y - horizon) / (height - horizon), 0, 1)
    far, near, bend = rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.9), rng.uniform(-0.5, 0.5)
    middle = width * (far + (near - far) * depth + bend * depth * (1 - depth))
    half = width * (0.01 + rng.uniform(0.12, 0.4) * depth)
    across = (canvas.x - middle) / half
    inside = (np.abs(across) < 1) & (canvas.y > horizon + 1)
    grain = rng.normal(0, 0.06, (height, width, 1)).astype(np.float32)
    wear = noise(rng, height, width, (height / 3, 4))[..., None] * 0.08
    canvas.paint(np.s_[:, :], inside, earth(rng) * (1 + grain + wear), ROAD)
    if rng.random() < 0.6:
        dashes = np.sin(6 / (depth + 0.12) * rng.uniform(1, 3)) > rng.uniform(-1, 0.2)
        canvas.paint(np.s_[:, :], inside & (np.abs(across) < 0.05) & dashes, colour(rng, 0.6, 1))
    if rng.random() < 0.5:
        canvas.paint(np.s_[:, :], inside & (np.abs(np.abs(across) - 0.9) < 0.04), colour(rng, 0.6, 1))


def _shadow(canvas: Canvas, x: float, y: float, half: float) -> None:
    window = canvas.window(y - half / 4, x - 2 * half, y + half / 4, x + 2 * half)
    slant = canvas.rng.uniform(-0.8, 0.8) * half
    canvas.shade(window, _ellipse(canvas, window, x + slant, y, half * 1.2, half / 5), canvas.rng.uniform(0.45, 0.8))


def _ellipse(canvas: Canvas, window, x: float, y: float, rx: float, ry: float) -> np.ndarray:
    return ((canvas.x[window] - x) / rx) ** 2 + ((canvas.y[window] - y) / ry) ** 2 < 1


def tree(canvas: Canvas, x: float, y: float, size: float) -> None:
    """A trunk under a crown of leaves: round and ragged, or a pointed fir."""
    rng, tall = canvas.rng, size * 1.5
    half = tall * rng.uniform(0.22, 0.4)
    _shadow(canvas, x, y, half)
    window = canvas.window(y - tall, x - half * 1.3, y, x + half * 1.3)
    gx, gy = (canvas.x[window] - x) / half, (y - canvas.y[window]) / tall
    rows, columns = gx.shape
    trunk = (np.abs(gx) < 0.16) & (gy > 0) & (gy < 0.5)
    canvas.paint(window, trunk, earth(rng) * 0.6, TREE)
    ragged = noise(rng, rows, columns, (max(2, tall / 12),) * 2) * 0.45
    if rng.random() < 0.3:
        crown = (np.abs(gx) + ragged * 0.5 < (1.02 - gy) * 1.15) & (gy > 0.18)
    else:
        crown = gx**2 + ((gy - 0.64) / 0.36) ** 2 + ragged < 1
    leaves = noise(rng, rows, columns, (1.6, 1.6)) * 0.45 + 0.25 * (gy - 0.6) - 0.15 * gx * rng.choice((-1, 1))
    tint = earth(rng) if rng.random() < 0.7 else colour(rng, 0.1, 0.8)
    canvas.paint(window, crown, tint * (1 + leaves[..., None]), TREE)


def house(canvas: Canvas, x: float, y: float, size: float) -> None:
    """Walls with planks or bricks, a roof, windows and a door; one side lies in the shade."""
    rng = canvas.rng
    half = size * rng.uniform(0.5, 0.95)
    wall, roof = size * rng.uniform(0.6, 1.1), size * rng.uniform(0.2, 0.6)
    _shadow(canvas, x, y, half)
    window = canvas.window(y - wall - roof, x - half * 1.2, y, x + half * 1.2)
    gx, gy = (canvas.x[window] - x) / half, (y - canvas.y[window]) / wall
    front = (np.abs(gx) < 1) & (gy > 0) & (gy < 1)
    period = max(2.5, size / rng.uniform(6, 14))
    lines = np.sin((canvas.y[window] if rng.random() < 0.6 else canvas.x[window]) * (2 * np.pi / period))
    light = 1 + 0.1 * lines - 0.25 * (gx > rng.uniform(0, 1.5))
    canvas.paint(window, front, colour(rng) * light[..., None], HOUSE)
    slope = rng.uniform(0, 0.9)
    up = (gy - 1) * wall / roof
    tiles = 1 + 0.15 * np.sin(canvas.x[window] * (2 * np.pi / period)) * np.sin(canvas.y[window] * (4 * np.pi / period))
    canvas.paint(
        window, (np.abs(gx) < 1.12 - slope * up) & (up >= 0) & (up < 1), colour(rng, 0.1, 0.7) * tiles[..., None], HOUSE
    )
    pane = colour(rng, 0.05, 1.0)
    columns = rng.integers(2, 5)
    across = (gx + 1) / 2 * columns % 1
    canvas.paint(window, front & (np.abs(across - 0.5) < 0.22) & (np.abs(gy - 0.68) < 0.14), pane)
    canvas.paint(window, front & (np.abs(gx - rng.uniform(-0.7, 0.7)) < 0.14) & (gy < 0.42), colour(rng, 0.1, 0.7))


def car(canvas: Canvas, x: float, y: float, size: float) -> None:
    """Body, cabin with windows, two wheels."""
    rng, half, tall = canvas.rng, size * 0.75, size * 0.6
    _shadow(canvas, x, y, half)
    window = canvas.window(y - tall, x - half, y, x + half)
    gx, gy = (canvas.x[window] - x) / half * rng.choice((-1, 1)), (y - canvas.y[window]) / tall
    paint = colour(rng, 0.08, 0.95)
    body = (np.abs(gx) < 0.98) & (gy > 0.16) & (gy < 0.56 - 0.1 * gx)
    cabin = (gy >= 0.4) & (gy < 0.98) & (gx > -0.8 + 0.55 * (gy - 0.5)) & (gx < 0.5 - 0.6 * (gy - 0.5))
    canvas.paint(window, body | cabin, paint * (0.75 + 0.5 * gy[..., None]), CAR)
    glass = cabin & (gy > 0.6) & (gy < 0.88) & (np.abs(gx + 0.17) > 0.05) & (gx > -0.62) & (gx < 0.26)
    canvas.paint(window, glass, colour(rng, 0.05, 0.9))
    canvas.paint(window, body & (gx > 0.86) & (gy > 0.3), colour(rng, 0.7, 1))
    for wheel in (-0.56, 0.56):
        radius = ((gx - wheel) * half) ** 2 + ((gy - 0.2) * tall) ** 2
        canvas.paint(window, radius < (0.2 * tall + 0.5) ** 2, np.full(3, rng.uniform(0.03, 0.2), np.float32), CAR)
        canvas.paint(window, radius < (0.09 * tall) ** 2, np.full(3, rng.uniform(0.4, 0.9), np.float32))


def person(canvas: Canvas, x: float, y: float, size: float) -> None:
    """Head, coat and two legs."""
    rng, tall = canvas.rng, size * 1.1
    half = tall * rng.uniform(0.22, 0.3)
    _shadow(canvas, x, y, half)
    window = canvas.window(y - tall, x - half, y, x + half)
    gx, gy = (canvas.x[window] - x) / half, (y - canvas.y[window]) / tall
    stride = rng.uniform(0.15, 0.6)
    legs = (gy > 0) & (gy < 0.48) & (np.abs(np.abs(gx) - stride * (0.5 - gy) - 0.25) < 0.24)
    canvas.paint(window, legs, colour(rng, 0.05, 0.7), PERSON)
    coat = (gy >= 0.4) & (gy < 0.83) & (np.abs(gx) < 0.95 - 0.9 * np.abs(gy - 0.62))
    folds = 1 + 0.2 * noise(rng, *gx.shape, (max(1, tall / 10), max(1, half / 3)))[..., None]
    canvas.paint(window, coat, colour(rng) * folds, PERSON)
    skin = np.array((0.85, 0.65, 0.5), np.float32) * rng.uniform(0.35, 1.1)
    head = (gx * half / tall) ** 2 + (gy - 0.9) ** 2 < 0.0085
    canvas.paint(window, head, skin, PERSON)
    canvas.paint(window, head & (gy > 0.93), colour(rng, 0.05, 0.6))


def sign(canvas: Canvas, x: float, y: float, size: float) -> None:
    """A round, square or three-cornered plate with a rim on a pole."""
    rng = canvas.rng
    tall = size * rng.uniform(1.0, 1.4)
    half = tall * rng.uniform(0.24, 0.34)
    window = canvas.window(y - tall, x - half, y, x + half)
    gx, gy = (canvas.x[window] - x) / half, (y - canvas.y[window] - tall + half) / half
    canvas.paint(
        window,
        (np.abs(canvas.x[window] - x) < 0.6 + tall * 0.018) & (gy < 0),
        np.full(3, rng.uniform(0.2, 0.8), np.float32),
        SIGN,
    )
    distance = (np.hypot(gx, gy), np.maximum(np.abs(gx), np.abs(gy)), np.maximum(2 * np.abs(gx) + gy, -2 * gy) * 0.8)[
        rng.integers(3)
    ]
    canvas.paint(window, distance < 1, colour(rng), SIGN)
    canvas.paint(window, distance < 0.72, colour(rng), SIGN)
    canvas.paint(window, (np.abs(gx) < 0.4) & (np.abs(gy + 0.05) < 0.14), colour(rng, 0, 1))


def balloon(canvas: Canvas, horizon: float) -> None:
    """A striped hot-air balloon with its basket."""
    rng = canvas.rng
    radius = canvas.height * rng.uniform(0.05, 0.14)
    x, y = rng.uniform(0, canvas.width), rng.uniform(0, horizon)
    window = canvas.window(y - radius, x - radius, y + 2 * radius, x + radius)
    gx, gy = (canvas.x[window] - x) / radius, (canvas.y[window] - y) / radius
    envelope = gx**2 + np.where(gy < 0, gy, gy / 1.35) ** 2 < 1
    gores = np.sin(np.arcsin(np.clip(gx / np.sqrt(np.clip(1 - (gy / 1.4) ** 2, 0.05, 1)), -1, 1)) * rng.integers(2, 6) * 2) > 0
    first, second = colour(rng), colour(rng)
    canvas.paint(window, envelope, np.where(gores[..., None], first, second) * (1 - 0.25 * gx[..., None]), BALLOON)
    basket = (np.abs(gx) < 0.2) & (np.abs(gy - 1.72) < 0.16)
    ropes = (np.abs(np.abs(gx) - 0.2) < 0.04) & (gy > 1.2) & (gy < 1.6)
    canvas.paint(window, basket | ropes, earth(rng) * 0.6, BALLOON)
