"""Looking through a whole data set for faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..images import ImageError, read_image
from ..palette import IGNORED
from .pairs import DataError, MissingError, Pairs, require_same_size
from .registry import kind
from .workers import each, report_dead_workers


@dataclass
class Report:
    """What is in a split.

    Args:
        classes: their names.
        pairs: number of images with a mask, the broken ones included.
        faults: a sentence for each, which names the file.
        pixels: int64 [256], how many there are of every label.
        sizes: (height, width) of the images.
    """

    classes: list[str] = field(default_factory=list)
    pairs: int = 0
    faults: list[str] = field(default_factory=list)
    pixels: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    sizes: set[tuple[int, int]] = field(default_factory=set)

    @property
    def shares(self) -> list[float]:
        """Every class' share of the pixels that have one."""
        counts = self.pixels[: len(self.classes)].double()
        return (counts / counts.sum().clamp_min(1)).tolist()

    @property
    def ignored(self) -> float:
        """The share of all pixels that have none."""
        return self.pixels[IGNORED].item() / max(self.pixels.sum().item(), 1)

    def __str__(self) -> str:
        heights, widths = ([size[side] for size in self.sizes] or [0] for side in (0, 1))
        ranges = f"height {min(heights)} to {max(heights)}, width {min(widths)} to {max(widths)}"
        return f"pairs: {self.pairs}; {ranges}; faults: {len(self.faults)}"


def check(pairs: Pairs, workers: int = 0) -> Report:
    """Reads every image and every mask, in ``workers`` processes, and goes on after faults.

    Raises:
        DataError: one of the processes died.
    """
    report = Report(pairs.classes, len(pairs), list(pairs.faults))
    with report_dead_workers():
        for faults, pixels, size in each(_Inspected(pairs), workers, "checking"):
            report.faults += faults
            report.pixels += pixels
            if size:
                report.sizes.add(tuple(size))
    if not pairs:
        report.faults.append("there is no image with a mask")
    return report


class _Inspected(Dataset):
    """Item: (what is wrong with a pair, its pixels of every label int64 [256], the image's height and width or nothing)."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[list[str], Tensor, tuple[int, ...]]:
        image_file, mask_file = self.pairs.files[index]
        faults: list[str] = []
        image, labels = _try(faults, read_image, image_file), _try(faults, self.pairs.read_mask, mask_file)
        if image is not None and labels is not None:
            _try(faults, require_same_size, image, labels, mask_file)
        pixels = torch.zeros(256, dtype=torch.int64) if labels is None else labels.flatten().bincount(minlength=256)
        return faults, pixels, () if image is None else tuple(image.shape[1:])


def _try(faults: list[str], read: Callable, *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except (DataError, ImageError) as error:
        faults.append(str(error))


def check_splits(name: str, root: Path, splits: Sequence[str] = (), workers: int = 0) -> dict[str, Report]:
    """A report for every split of the data set ``name``; by default those that exist.

    Raises:
        DataError: no such data set, no such split, or none at all, or a process died.
    """
    dataset, reports, missing = kind(name), {}, None
    for split in splits or dataset.splits:
        try:
            pairs = dataset.find(root, split)
        except MissingError as error:
            if splits:
                raise
            missing = missing or error
        except DataError as error:  # the split is there, but nothing in it can be paired
            reports[split] = Report(faults=[str(error)])
        else:
            reports[split] = check(pairs, workers)
    if not reports:
        raise missing
    return reports


def summary(reports: dict[str, Report]) -> str:
    """The reports as text: sizes and faults of every split, the share of every class in it, the classes that never occur."""
    lines = []
    for split, report in reports.items():
        lines += [f"{split}: {report}", *(f"  {fault}" for fault in report.faults)]
    shares = {split: report.shares for split, report in reports.items() if report.pixels.any()}
    if shares:
        classes = next(report.classes for report in reports.values() if report.classes)
        width = max(len("share of pixels"), *map(len, classes)) + 2
        lines += ["", f"{'share of pixels':<{width}}" + "".join(f"{split:>10}" for split in shares)]
        for name, *row in zip(classes, *shares.values(), strict=True):
            lines.append(f"{name:<{width}}" + "".join(f"{share:>10.3%}" for share in row))
        ignored = [reports[split].ignored for split in shares]
        if any(ignored):
            lines += ["", f"{'without a class':<{width}}" + "".join(f"{share:>10.3%}" for share in ignored)]
    for split in shares:
        absent = [name for name, share in zip(classes, shares[split], strict=True) if not share]
        if absent:
            lines += ["", f"never in {split}: {', '.join(absent)}"]
    return "\n".join(lines)
