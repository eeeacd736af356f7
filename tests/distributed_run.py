"""What a process of a training on several machines does, or one process alone: run by tests/test_distributed.py.

Each run's processes are forked, so that what they import is imported once, and get what torchrun would tell them. Writes what
came out of each to a file.
"""

from __future__ import annotations

import copy
import itertools
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import small
import torch
import torch.multiprocessing

from segnext import distributed
from segnext.data import Scenes
from segnext.loop import _evaluated
from segnext.recipes import Recipe
from segnext.trainer import Trainer

torch.set_num_threads(1)
RECIPE = Recipe(iterations=3, batch=4, lr=1e-3, head_lr=1.0, warmup=0.05, weight_decay=0.0)


class Counted(Scenes):
    """Scenes that know which were asked for; some pixels have no label, on some more than on others."""

    def __init__(self) -> None:
        super().__init__(7, (32, 48))
        self.asked: list[int] = []

    def __getitem__(self, index: int):
        self.asked.append(index)
        image, labels = super().__getitem__(index)
        labels = labels.clone()
        labels[: 4 * index] = 255
        return image, labels


def trainer(**changes) -> Trainer:
    model = small.model(num_classes=10, dropout=0.0, drop_path=0.0)
    bases = torch.rand(1, small.CONFIG.decoder_channels, small.CONFIG.rank, generator=torch.Generator().manual_seed(0))
    forward = model.forward
    model.forward = lambda images: forward(images, bases.expand(len(images), -1, -1))  # not drawn anew by each process
    return Trainer(model, Counted(), replace(RECIPE, **changes))


def compare(sync_norm: bool) -> dict:
    """What is to be the same for any number of processes."""
    loop = trainer(sync_norm=sync_norm)
    loop.optimizer.zero_grad = lambda **options: None  # so that the last step's gradients are left to look at
    losses = []
    for step in loop.steps():
        losses.append(step.loss)
        gradients = {name: parameter.grad.clone() for name, parameter in loop.model.named_parameters()}
        for parameter in loop.model.parameters():
            parameter.grad.zero_()
    val = Counted()
    del loop.model.forward  # evaluation has bases that are the same for all
    scores = _evaluated(loop, val, 0)
    state, optimizer = loop.model.state_dict(), loop.optimizer.state
    momenta = {name: optimizer[parameter]["exp_avg"] for name, parameter in loop.model.named_parameters()}
    answer = {"losses": losses, "gradients": gradients, "momenta": momenta, "state": state}
    return answer | {"confusion": scores.confusion, "seen": val.asked}


def resume() -> dict:
    """The weights of an unbroken training, and of one that goes on after two steps."""
    unbroken, first, second = (trainer(batch=3, iterations=4) for _ in range(3))
    list(unbroken.steps())
    for _ in itertools.islice(first.steps(), 2):
        pass
    second.load(copy.deepcopy(first.state()))
    list(second.steps())
    return {"unbroken": unbroken.model.state_dict(), "resumed": second.model.state_dict(), "done": second.done}


RUNS = {
    "one": (1, lambda: compare(sync_norm=True)),
    "two": (2, lambda: compare(sync_norm=True)),
    "plain": (2, lambda: compare(sync_norm=False)),
    "three": (3, resume),
}


def process(rank: int, processes: int, port: int, what: Callable[[], dict], out: Path) -> None:
    if processes > 1:
        names = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    with distributed.processes("cpu"):
        torch.save(what(), out / f"{distributed.rank()}.pt")


def main(out: Path) -> None:
    for name, (processes, what) in RUNS.items():
        (out / name).mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        arguments = (processes, port, what, out / name)
        torch.multiprocessing.start_processes(process, arguments, processes, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
