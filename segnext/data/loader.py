"""Batches in an order that depends on the seed alone: the same for any number of processes, workers and interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors

from ..images import ImageError
from ..signals import ignore_stop_signals
from .pairs import DataError


@dataclass(frozen=True)
class Batch:
    """Images uint8 [B, 3, H, W], labels uint8 [B, H, W], and the pictures' numbers in the data set."""

    images: Tensor
    labels: Tensor
    indices: list[int]

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.indices)


def mixed_seed(*parts: int) -> int:
    """A seed of 63 bits from whole numbers, another for any other numbers or another count of them."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Order(Sampler):
    """Endless shares of batches, as (index, place) of pictures; every picture comes once before any comes again.

    The stream of pictures has places 0, 1, 2, ...; step k takes ``batch`` of them from ``k * batch`` on, and deals them to
    ``shares`` (accumulated steps times processes) in turn.

    Args:
        count: of pictures in the data set.
        batch: pictures in a step, a multiple of ``shares``.
        mine: the numbers of the shares that this process takes, in order; None for all.
        first: the step to begin with.
    """

    def __init__(
        self, count: int, batch: int, seed: int, *, shares: int = 1, mine: Sequence[int] | None = None, first: int = 0
    ) -> None:
        self.count, self.batch, self.seed, self.shares, self.first = count, batch, seed, shares, first
        self.mine = range(shares) if mine is None else mine

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, step = self.batch // self.shares, self.first
        epoch, order = -1, []
        while True:
            for share in self.mine:
                start, items = step * self.batch + share * size, []
                for place in range(start, start + size):
                    if place // self.count != epoch:
                        epoch = place // self.count
                        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
                        order = torch.randperm(self.count, generator=generator).tolist()
                    items.append((order[place % self.count], place))
                yield items
            step += 1


class Augmented(Dataset):
    """A data set whose items, asked for by (index, place), are augmented by what the seed and the place say alone.

    An item that cannot be read is returned as the error, so that it comes out of a worker process as it is.
    """

    def __init__(self, pairs: Dataset, augment: Callable | None, seed: int) -> None:
        self.pairs, self.augment, self.seed = pairs, augment, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int] | Exception:
        index, place = key
        try:
            image, labels = self.pairs[index]
        except (DataError, ImageError, OSError) as error:
            return error
        if self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mixed_seed(self.seed, place, 0))
                image, labels = self.augment(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return torch.as_tensor(image), torch.as_tensor(labels), index


def collate(items: Sequence[tuple[Tensor, Tensor, int] | Exception]) -> Batch | Exception:
    """The items as a batch, or the first error among them."""
    errors = [item for item in items if isinstance(item, Exception)]
    if errors:
        return errors[0]
    images, labels, indices = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.stack(labels), list(indices))


def batches(
    pairs: Dataset, order: Order, augment: Callable | None = None, *, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """The order's shares of batches, read and augmented by worker processes, without end; to be used in
    :func:`report_dead_workers`.

    Raises:
        DataError, ImageError: a picture cannot be read.
    """
    yield from _checked(Augmented(pairs, augment, order.seed), order, workers, pin_memory)


def one_by_one(pairs: Dataset, indices: Sequence[int], workers: int = 0) -> Iterator[Batch]:
    """The pictures of these numbers as they are, in batches of one; to be used in :func:`report_dead_workers`.

    Raises:
        DataError, ImageError: a picture cannot be read.
    """
    yield from _checked(Augmented(pairs, None, 0), [[(index, 0)] for index in indices], workers)


def _checked(items: Augmented, order: Iterable, workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """The batches; an error among them is raised."""
    loader = DataLoader(
        items,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # of the workers' seeds; the global one is left alone
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
