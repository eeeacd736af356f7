"""From the values in a mask file to labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..images import read_labels
from ..palette import IGNORED
from .find import by_name
from .pairs import DataError


def lookup_table(labels: Mapping[int, int]) -> np.ndarray:
    """The label of every value of a mask, int16 [n]; -1 for values that are not in ``labels`` and must not occur."""
    table = np.full(max(labels) + 1, -1, np.int16)
    table[list(labels)] = list(labels.values())
    return table


def identity_table(classes: int) -> np.ndarray:
    """The table of masks whose values are the labels themselves."""
    return lookup_table({**{label: label for label in range(classes)}, IGNORED: IGNORED})


def read_by_table(path: str | Path, table: np.ndarray) -> Tensor:
    """The labels uint8 [H, W] of a greyscale or index-colour mask file.

    Raises:
        DataError: a value that is not in the table.
        ImageError: as :func:`segnext.images.read_labels`.
    """
    return look_up(read_labels(path).numpy(), table, path)


def look_up(values: np.ndarray, table: np.ndarray, path: str | Path) -> Tensor:
    """The labels uint8 [H, W] of integer values [H, W]; a value that is not in the table is a DataError that names the path."""
    inside = (values >= 0) & (values < len(table))
    labels = table[np.where(inside, values, 0)]
    wrong = ~inside | (labels < 0)
    if wrong.any():
        classes = len(np.setdiff1d(table, (-1, IGNORED)))
        raise DataError(f"{path}: value {values[wrong][0]} stands for none of the {classes} classes")
    return torch.from_numpy(labels.astype(np.uint8))


def matlab_files(folder: Path) -> dict[str, Path]:
    """The MATLAB files in a folder, by name."""
    import scipy.io  # noqa: F401 - if it is not installed, say so here, not in a worker process

    return by_name(folder, ".mat")


def read_matlab(path: str | Path, *names: str) -> np.ndarray:
    """The integers [H, W] in a MATLAB file, by the names of the variable and of the fields that lead to them.

    Raises:
        DataError: a file that cannot be read, or holds something else.
    """
    from scipy.io import loadmat

    try:
        value = loadmat(path, squeeze_me=True, struct_as_record=False)[names[0]]
        for name in names[1:]:
            value = getattr(value, name)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # what the reader raises on a broken file depends on where it breaks
        raise DataError(f"{path}: {'.'.join(names)} cannot be read from this MATLAB file: {error}") from error
    values = np.atleast_2d(value)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"{path}: {'.'.join(names)} is no label map")
    return values
