"""What a process of a training on several machines does, or one process alone: run by tests/test_distributed.py.

Writes the gradients of a step, the running statistics, and the scores of an evaluation.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import small
import torch

from segnext import distributed
from segnext.data import Scenes
from segnext.evaluate import evaluate
from segnext.recipes import Recipe
from segnext.trainer import Trainer

torch.set_num_threads(1)
RECIPE = Recipe(iterations=3, batch=4, lr=1e-3, head_lr=1.0, warmup=0.05, weight_decay=0.0)


class Counted(Scenes):
    """Scenes that know which were asked for; some pixels have no label, on some more than on others."""

    names = [f"scene {i}" for i in range(7)]

    def __getitem__(self, index: int):
        image, labels = super().__getitem__(index)
        labels = labels.clone()
        labels[: 4 * index] = 255
        return image, labels


def main(out: Path, accumulate: int, sync_norm: bool) -> None:
    with distributed.processes("cpu"):
        model = small.model(num_classes=10, dropout=0.0, drop_path=0.0)
        bases = torch.rand(1, small.CONFIG.decoder_channels, small.CONFIG.rank, generator=torch.Generator().manual_seed(0))
        forward = model.forward
        model.forward = lambda images: forward(images, bases.expand(len(images), -1, -1))  # not drawn anew by each process
        data = Counted(7, (32, 48))
        trainer = Trainer(model, data, replace(RECIPE, sync_norm=sync_norm), accumulate=accumulate)
        trainer.optimizer.zero_grad = lambda: None  # so that the last step's gradients are left to look at
        losses = []
        for step in trainer.steps():
            losses.append(step.loss)
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            for parameter in model.parameters():
                parameter.grad.zero_()
        distributed.share_buffers(model)
        seen: list[str] = []
        scores = evaluate(model, data, 10, look=lambda name, *rest: seen.append(name))
        result = {
            "losses": losses,
            "gradients": gradients,
            "state": model.state_dict(),
            "confusion": scores.confusion,
            "seen": seen,
        }
        torch.save(result, out / f"{distributed.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "sync")
