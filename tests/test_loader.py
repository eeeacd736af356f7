"""Batches: the order depends on the seed alone, errors come out of workers as they are."""

from __future__ import annotations

import itertools
import os
import signal

import pytest
import torch
from torchvision.transforms import v2

from segnext.data import DataError
from segnext.data.loader import Augmented, Order, batches, mixed_seed, one_by_one
from segnext.data.workers import report_dead_workers
from segnext.images import ImageError


class Numbers:
    """Pictures whose pixels count up from their number, and labels of it alone; some of them cannot be read."""

    def __init__(self, count: int, broken: int | None = None, deadly: int | None = None) -> None:
        self.count, self.broken, self.deadly = count, broken, deadly

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index == self.broken:
            raise ImageError(f"{index}.jpg: not an image")
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        image = torch.arange(index, index + 64, dtype=torch.uint8).view(8, 8).repeat(3, 1, 1)
        return image, torch.full((8, 8), index, dtype=torch.uint8)


def places(order: Order, steps: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(order, steps))


def test_every_picture_comes_once_before_any_comes_again():
    stream = [index for batch in places(Order(6, 4, seed=0), 9) for index, _ in batch]
    rounds = [stream[i : i + 6] for i in range(0, 36, 6)]
    assert all(sorted(one) == list(range(6)) for one in rounds) and len(set(map(tuple, rounds))) > 3


def test_places_count_up_and_seeds_change_the_order():
    assert [place for batch in places(Order(5, 3, seed=0), 4) for _, place in batch] == list(range(12))
    assert places(Order(9, 9, seed=0), 1) == places(Order(9, 9, seed=0), 1) != places(Order(9, 9, seed=1), 1)


@pytest.mark.parametrize("shares", [2, 4])
def test_shares_make_up_the_batch(shares):
    whole = places(Order(7, 8, seed=3), 5)
    dealt = [places(Order(7, 8, seed=3, shares=shares, mine=[i]), 5) for i in range(shares)]
    assert [sum((share[step] for share in dealt), []) for step in range(5)] == whole
    one_after_another = places(Order(7, 8, seed=3, shares=shares), 5 * shares)
    assert sum(one_after_another, []) == sum(whole, [])


def test_an_order_goes_on_where_it_is_told():
    assert places(Order(7, 4, seed=3, first=5), 3) == places(Order(7, 4, seed=3), 8)[5:]


def test_seeds_differ():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**40, 3)]
    assert len({mixed_seed(*one) for one in parts}) == len(parts) and 0 <= mixed_seed(1, 2) < 2**63


def first_batches(count: int, workers: int, first: int = 0, shares: int = 1):
    augment = v2.Compose([v2.RandomCrop(4), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)])
    return list(
        itertools.islice(batches(Numbers(9), Order(9, 4, 1, shares=shares, first=first), augment, workers=workers), count)
    )


def test_batches_are_the_same_for_any_number_of_workers_and_starts():
    torch.manual_seed(0)
    here, there = first_batches(6, 0), first_batches(6, 2)
    torch.manual_seed(9)
    later = first_batches(2, 1, first=4)
    for a, b in [*zip(here, there, strict=True), *zip(here[4:], later, strict=True)]:
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.indices == b.indices
    assert here[0].images.shape == (4, 3, 4, 4) and here[0].labels[:, 0, 0].tolist() == here[0].indices
    halves = first_batches(4, 0, shares=2)
    assert torch.equal(torch.cat([halves[2].images, halves[3].images]), here[1].images)


def test_a_picture_is_augmented_anew_in_every_round():
    cropped = Augmented(Numbers(3), v2.RandomCrop(2), seed=0)
    assert len({cropped[1, place][0][0, 0, 0].item() for place in range(8)}) > 3


def test_augmentation_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first_batches(2, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_named_as_they_are(workers):
    with pytest.raises(ImageError, match=r"^4.jpg: not an image$"):
        list(one_by_one(Numbers(9, broken=4), range(9), workers))


def test_the_death_of_a_worker_is_told():
    with pytest.raises(DataError, match="a process that reads pictures died"), report_dead_workers():
        list(one_by_one(Numbers(9, deadly=4), range(9), 1))


def test_one_by_one():
    assert [batch.indices for batch in one_by_one(Numbers(9), range(1, 9, 3))] == [[1], [4], [7]]


def test_a_reader_of_what_is_printed_that_is_gone_is_no_worker():
    with pytest.raises(BrokenPipeError), report_dead_workers():
        raise BrokenPipeError
