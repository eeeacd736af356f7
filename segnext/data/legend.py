"""Names and colours of the classes of well-known data sets; they are in ``classes/``, a class a line: R G B name."""

from __future__ import annotations

from pathlib import Path

from ..palette import Colour

FOLDER = Path(__file__).with_name("classes")


def legend(name: str) -> tuple[list[str], list[Colour]]:
    """The classes' names and their colours in ``classes/NAME.txt``, in the order of the labels."""
    lines = [line.split(maxsplit=3) for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()]
    return [line[3] for line in lines], [tuple(map(int, line[:3])) for line in lines]
