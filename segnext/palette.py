"""Label maps as pictures: palettes, index-colour masks, overlays, legends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

Colour = tuple[int, int, int]
IGNORED = 255  # the label of pixels without a class


def generated_palette(classes: int) -> list[Colour]:
    """Distinct colours for any number of classes: the bits of the class number, from the lowest, are dealt to the highest free
    bits of red, green and blue in turn. Black is left to ignored pixels.

    Source: the colour map of the PASCAL VOC development kit (``VOCcolormap.m``), from its second colour on.
    """
    return [
        tuple(sum((number >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3))
        for number in range(1, classes + 1)
    ]


def mask_image(labels: Tensor, palette: Sequence[Colour]) -> Image.Image:
    """An index-colour ("P") image of labels [H, W] in 0..255; labels beyond the palette are black."""
    image = Image.fromarray(labels.cpu().numpy().astype(np.uint8))
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    image.putpalette(colours.tobytes())
    return image


def photo_image(image: Tensor) -> Image.Image:
    """A PIL image of uint8 [3, H, W]."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def overlay(image: Tensor, labels: Tensor, palette: Sequence[Colour], alpha: float = 0.5) -> Image.Image:
    """The picture uint8 [3, H, W] under its labels' colours [H, W]; alpha 0 shows only the picture, 1 only the colours."""
    return Image.blend(photo_image(image), mask_image(labels, palette).convert("RGB"), alpha)


@lru_cache
def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """DejaVu Sans, Matplotlib's or the system's, which has most alphabets; else Pillow's own, which has English letters."""
    name, matplotlib = "DejaVuSans.ttf", find_spec("matplotlib")
    origin = matplotlib and matplotlib.origin  # none of a mere folder of that name
    places = [Path(origin).parent / "mpl-data" / "fonts" / "ttf" / name] if origin else []
    for place in (*places, name):
        try:
            return ImageFont.truetype(place, size)
        except OSError:  # there is none
            continue
    return ImageFont.load_default(size)


def legend(classes: Sequence[str], palette: Sequence[Colour], columns: int = 0) -> Image.Image:
    """A table of coloured squares with the classes' names, in ``columns`` columns (0: one for every 25 classes)."""
    letters, line, margin = font(13), 22, 6
    columns = min(columns or -(-len(classes) // 25), len(classes))
    rows = -(-len(classes) // columns)
    width = line + 2 * margin + max(int(letters.getlength(name)) for name in classes)
    image = Image.new("RGB", (columns * width + margin, rows * line + 2 * margin), "white")
    draw = ImageDraw.Draw(image)
    for i, (name, colour) in enumerate(zip(classes, palette, strict=True)):
        x, y = margin + i // rows * width, margin + i % rows * line
        draw.rectangle((x, y + 3, x + 16, y + 18), fill=colour, outline="grey")
        draw.text((x + line, y + 3), name, fill="black", font=letters)
    return image


def comparison(
    image: Tensor, truth: Tensor, prediction: Tensor, palette: Sequence[Colour], key: Image.Image, scale: int = 1
) -> Image.Image:
    """A picture uint8 [3, H, W], its labels [H, W] and predicted ones, each ``scale`` times its size, above a legend."""
    masks = (mask_image(labels, palette).convert("RGB") for labels in (truth, prediction))
    pictures = [ImageOps.scale(picture, scale, Image.Resampling.NEAREST) for picture in (photo_image(image), *masks)]
    return side_by_side(pictures, ("picture", "truth", "prediction"), key)


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str], below: Image.Image) -> Image.Image:
    """Pictures of one size in a row, a title above each, and one picture (a legend) below them all."""
    gap, top = 8, 24
    width, height = pictures[0].size
    row = len(pictures) * (width + gap) - gap
    sheet = Image.new("RGB", (max(row, below.width), top + height + gap + below.height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        draw.text((i * (width + gap) + 4, 3), title, fill="black", font=font(13))
        sheet.paste(picture, (i * (width + gap), top))
    sheet.paste(below, (0, top + height + gap))
    return sheet
