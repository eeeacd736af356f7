"""Work on many files in several processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .pairs import DataError


def each(dataset: Dataset, workers: int, doing: str) -> Iterator[Any]:
    """The items in order, made in that many processes (0: in this one), with a bar that says what is being done; to be used in
    :func:`report_dead_workers`."""
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    return iter(tqdm(loader, desc=doing, unit="photo", leave=False, disable=None))


@contextlib.contextmanager
def report_dead_workers() -> Iterator[None]:
    """Turns the errors by which the death of a worker shows into one sentence.

    Torch raises one of its own from a signal handler, wherever the main process is, so this has to be around all that is done
    meanwhile; if it was reading what the worker sent, the connection's error comes first.
    """
    try:
        yield
    except (EOFError, ConnectionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        told = error
        try:
            time.sleep(0.5)  # for the handler, if it was not the first
        except RuntimeError as later:
            told = later
        if isinstance(told, BrokenPipeError):  # whoever read what is printed is gone
            raise
        reason = (str(told) or type(told).__name__).splitlines()[0]
        raise DataError(f"a process that reads pictures died (out of memory?): {reason}") from error
