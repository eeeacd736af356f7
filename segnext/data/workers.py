"""Work on many files in several processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


def each(dataset: Dataset, workers: int, doing: str) -> Iterator[Any]:
    """The items in order, made in that many processes (0: in this one), with a bar that says what is being done."""
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    return iter(tqdm(loader, desc=doing, unit="photo", leave=False, disable=None))
