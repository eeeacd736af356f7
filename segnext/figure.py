"""Figures of pictures in rows and columns, with a caption under every column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .checkpoint import check_file
from .model import SIZES, Config
from .palette import Colour, font, legend
from .predict import InputError

GAP, LINE = 8, 26  # pixels between pictures, and of a line of text
FONT = font(15)


def figure(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    width: int,
    *,
    titles: Sequence[str] = (),
    below: Image.Image | None = None,
) -> Image.Image:
    """Rows of pictures, each row's of one size.

    Args:
        captions: one under each column.
        width: of a column in pixels; pictures are resized to it in their shape. 0 for that of the widest picture.
        titles: one above each row, if any.
        below: a picture, such as a legend, under it all.
    """
    width = width or max(row[0].width for row in rows)
    rows = [[at_width(picture, width) for picture in row] for row in rows]
    heights = [row[0].height for row in rows]
    top = LINE if titles else 0
    across = len(captions) * (width + GAP) + GAP
    bottom = 0 if below is None else below.height + GAP
    size = (max(across, 0 if below is None else below.width), GAP + sum(heights) + len(rows) * (top + GAP) + LINE + bottom)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    y = GAP
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if titles:
            draw.text((GAP, y + top // 2), titles[i], fill="black", font=FONT, anchor="lm")
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (width + GAP), y + top))
        y += top + height + GAP
    for column, caption in enumerate(captions):
        middle = GAP + column * (width + GAP) + width // 2
        draw.text((middle, y + LINE // 2 - GAP // 2), caption, fill="black", font=FONT, anchor="mm")
    if below is not None:
        sheet.paste(below, (0, y + LINE))
    return sheet


def at_width(picture: Image.Image, width: int) -> Image.Image:
    """The picture in its shape, that many pixels wide; 0 leaves it as it is. Rows made so take little memory."""
    if width in (0, picture.width):
        return picture
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.BOX)


def fitting_legend(classes: Sequence[str], palette: Sequence[Colour], width: int) -> Image.Image:
    """A legend in as many columns as fit into a width, at least one."""
    columns = len(classes)
    drawn = legend(classes, palette, columns)
    while drawn.width > width and columns > 1:
        columns -= 1
        drawn = legend(classes, palette, columns)
    return drawn


def model_title(config: Config, name: str = "SegNeXt") -> str:
    """The name with the paper's letter for the size, as SegNeXt-T, if it is one of the paper's."""
    shape = (config.channels, config.depths)
    letters = (size.upper() for size, known in SIZES.items() if (known.channels, known.depths) == shape)
    return "-".join([name, *letters])


def require_new_png(out: Path, inputs: Sequence[Path]) -> None:
    """Makes the folder of a figure, and raises an InputError where it would have another ending, or overwrite what it is made
    from, or an OSError where it cannot be written."""
    if out.suffix.lower() != ".png":
        raise InputError(f"{out} must end in .png")
    if out.resolve() in {path.resolve() for path in inputs}:
        raise InputError(f"{out} would be overwritten by the figure; choose another name")
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file for the figure")
    check_file(out)


def for_each(values: Sequence, rows: int, what: str) -> list:
    """A value for every row of a figure: one for all, or as many as there are rows, or None where there is none."""
    if len(values) not in (0, 1, rows):
        raise InputError(f"the figure has {rows} rows: give one {what} for all of them or {rows}, not {len(values)}")
    return list(values) if len(values) == rows else list(values or [None]) * rows
