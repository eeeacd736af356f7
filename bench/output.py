"""Files and plots."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NO_PLOTS = "no plots: matplotlib not installed"


def write(path: Path, content: str | bytes) -> None:
    """The whole file or none: written under another name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def write_json(path: Path, figures: object) -> None:
    write(path, json.dumps(figures, indent=1) + "\n")


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(path: Path, size: tuple[float, float], draw: Callable[..., None], axes: int = 1) -> None:
    """A PNG of ``size`` inches with so many axes side by side, which ``draw`` fills."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(*figure.subplots(1, axes, squeeze=False)[0])
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write(path, content.getvalue())


def bars(axis: Axes, names: list[str], values: list[float], label: str) -> None:
    """Horizontal bars on a logarithmic scale, the first on top, each with its value."""
    drawn = axis.barh(names, values)
    axis.bar_label(drawn, [f"{value:.3g}" for value in values], padding=2, fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.tick_params(axis="y", labelsize=7)
    axis.margins(x=0.1, y=0.01)


def table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Markdown; all but the first columns hold numbers."""
    aligned = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, aligned, *rows))
