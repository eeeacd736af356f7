"""Time of the fused model and its fastest peers against image size, batch and threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from segnext.model import SIZES, Config

from . import output
from .case import Case, Contender
from .environment import environment, heading, missing
from .measure import measure
from .models import logits_case

SIDES = ((256, 256), (512, 512), (1024, 1024), (1024, 2048))
BATCHES = (1, 2, 4)
DTYPES = (torch.float32, torch.bfloat16)
AXES = {"image": "pixels", "batch": "images", "threads": "threads"}


@dataclass(frozen=True)
class Point:
    """One place on one axis; all but one of the three are the base's."""

    image_size: tuple[int, int] = (512, 512)
    batch: int = 1
    threads: int = 1

    def x(self, axis: str) -> int:
        return {"image": self.image_size[0] * self.image_size[1], "batch": self.batch, "threads": self.threads}[axis]

    def name(self, axis: str) -> str:
        return {"image": "x".join(map(str, self.image_size)), "batch": str(self.batch), "threads": str(self.threads)}[axis]


def grid(sides: Sequence[tuple[int, int]] = SIDES, batches: Sequence[int] = BATCHES) -> dict[str, list[Point]]:
    """The points of every axis, for up to as many threads as PyTorch has now."""
    threads = torch.get_num_threads()
    base = sides[min(1, len(sides) - 1)]
    return {
        "image": [Point(side, 1, threads) for side in sides],
        "batch": [Point(base, batch, threads) for batch in batches],
        "threads": [Point(base, 1, count) for count in range(1, threads + 1)],
    }


def run(
    points: dict[str, list[Point]], seconds: float = 3.0, config: Config = SIZES["t"], name: str = "segnext_t"
) -> Iterator[dict]:
    """Measures every point once and fits every contender's time on every axis.

    Yields:
        The environment, missing peers, and for each axis its curves, of the points so far and the contenders that were measured
        at all of them, after every point: label, x, seconds and error at the points, exponent.
    """
    threads = torch.get_num_threads()
    cases = [logits_case(name, config, (512, 512), dtype) for dtype in DTYPES]
    figures = {"environment": environment(), "missing_peers": missing(cases), "model": name}
    every = tqdm(list(dict.fromkeys(point for axis in points.values() for point in axis)))
    found: dict[Point, dict[str, dict[str, float]]] = {}
    try:
        for point in every:
            every.set_description(f"{point.name('image')}, batch {point.batch}, {point.threads} threads")
            torch.set_num_threads(point.threads)
            found[point] = {}
            for dtype in DTYPES:
                case = logits_case(name, config, point.image_size, dtype, point.batch)
                for result in measure(case, "forward", seconds, _fastest(case), figures["missing_peers"]):
                    label = f"{result.contender.label} {case.name.rpartition('/')[2]}"
                    found[point][label] = {"seconds": result.seconds, "error": result.error}
            yield figures | {"axes": {axis: _curves(axis, on_axis, found) for axis, on_axis in points.items()}}
    finally:
        torch.set_num_threads(threads)


def _fastest(case: Case) -> tuple[Contender, ...]:
    """The fused model and other runtimes; plain PyTorch, channels_last, where there are none."""
    present = case.present()
    ours = [contender for contender in present if contender.ours]
    runtimes = [contender for contender in present if contender.packages]
    return (*ours, *(runtimes or [case.contender("PyTorch channels_last")]))


def _curves(axis: str, points: list[Point], found: dict[Point, dict[str, dict[str, float]]]) -> list[dict[str, object]]:
    points = [point for point in points if point in found]
    curves = []
    for label in dict.fromkeys(label for point in points for label in found[point]):
        if not all(label in found[point] for point in points):
            continue
        seconds = [found[point][label]["seconds"] for point in points]
        curves.append(
            {
                "label": label,
                "points": [point.name(axis) for point in points],
                "x": [point.x(axis) for point in points],
                "seconds": seconds,
                "error": [found[point][label]["error"] for point in points],
                "exponent": exponent([point.x(axis) for point in points], seconds),
            }
        )
    return curves


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """p of the power law y = a x**p that fits best in logarithms; None for a single x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(set(x)) > 1 else None


def markdown(figures: dict) -> str:
    """A table for every axis: milliseconds at every point and the fitted exponent."""
    parts = heading(figures)
    parts.append(f'{figures["model"]}, logits only, in ms; time grows with the power "exponent" of what is varied.')
    for axis, curves in figures["axes"].items():
        if not curves:  # not yet
            continue
        lines = [
            [
                c["label"],
                *(output.short(s * 1e3) for s in c["seconds"]),
                "" if c["exponent"] is None else f"{c['exponent']:.2f}",
            ]
            for c in curves
        ]
        parts.append(f"### Time against {axis}\n\n{output.table(['contender', *curves[0]['points'], 'exponent'], lines)}")
    return "\n\n".join(parts)


def plot(figures: dict, path: Path) -> None:
    """All axes side by side in logarithms."""
    axes = figures["axes"]

    def draw(*drawn) -> None:
        for axis, (name, curves) in zip(drawn, axes.items(), strict=True):
            for c in curves:
                power = "" if c["exponent"] is None else f", exponent {c['exponent']:.2f}"
                axis.loglog(c["x"], [s * 1e3 for s in c["seconds"]], marker="o", label=c["label"] + power)
            axis.set_xticks(curves[0]["x"], curves[0]["points"], fontsize=7)
            axis.minorticks_off()
            axis.set_xlabel(AXES[name])
            axis.set_ylabel("ms")
            axis.legend(fontsize=7)

    output.plot(path, (5 * len(axes), 4.5), draw, len(axes), len(axes))
