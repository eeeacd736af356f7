"""Files and plots."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from segnext.checkpoint import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NO_PLOTS = "no plots: matplotlib not installed"


def write(path: Path, content: str | bytes) -> None:
    """The whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, figures: object) -> None:
    """Numbers that are none, such as a peer's error, become null."""
    write(path, json.dumps(_finite(figures), indent=1, allow_nan=False) + "\n")


def _finite(figures: object) -> object:
    if isinstance(figures, dict):
        return {key: _finite(value) for key, value in figures.items()}
    if isinstance(figures, (list, tuple)):
        return [_finite(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def short(value: float) -> str:
    """Three digits, and all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(path: Path, size: tuple[float, float], draw: Callable[..., None], axes: int = 1, columns: int = 1) -> None:
    """A PNG of ``size`` inches with so many axes, which ``draw`` fills."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(-(-axes // columns), columns, squeeze=False).flatten()
    for unused in places[axes:]:
        unused.remove()
    draw(*places[:axes])
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write(path, content.getvalue())


def bars(axis: Axes, names: list[str], values: list[float], ours: list[bool], label: str, start: float = 0) -> None:
    """Horizontal bars from ``start``, the first on top, ours in another colour, each with its value."""
    colors = ["tab:orange" if own else "tab:blue" for own in ours]
    drawn = axis.barh(names, [value - start for value in values], left=start, color=colors)
    axis.bar_label(drawn, [short(value) for value in values], padding=2, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.tick_params(axis="y", labelsize=7)
    axis.margins(x=0.1, y=0.01)


def table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Markdown; all but the first columns hold numbers."""
    aligned = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, aligned, *rows))
