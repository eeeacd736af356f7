"""Pixel accuracy and intersection over union on a labelled data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .palette import IGNORED
from .predict import segment


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says: int64 [C, C], its rows the truth, its columns the prediction, counts of pixels."""

    confusion: Tensor

    @property
    def pixel_accuracy(self) -> float:
        """The share of labelled pixels that are right; nan without any."""
        return (self.confusion.trace() / self.confusion.sum()).item()

    @property
    def iou(self) -> Tensor:
        """Intersection over union of every class [C]; nan for a class that is neither in the truth nor predicted."""
        both = self.confusion.diagonal()
        return both / (self.confusion.sum(0) + self.confusion.sum(1) - both)

    @property
    def miou(self) -> float:
        """The mean of the classes' intersections over unions, leaving out those that are nan."""
        return self.iou.nanmean().item()

    def __str__(self) -> str:
        return f"mIoU {self.miou:.3f}, pixel accuracy {self.pixel_accuracy:.3f}"


def confusion_matrix(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts of pixels, int64 [classes, classes], for every true (row) and predicted (column) label; truth 255 is left out."""
    return multiclass_confusion_matrix(prediction, truth, classes, ignore_index=IGNORED, validate_args=False)


def evaluate(model: nn.Module, dataset: Dataset, classes: int) -> Scores:
    """Scores of a model on (uint8 [3, H, W], labels [H, W]) pairs of any sizes, one after another, at their full size."""
    training = model.training
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    model.eval()
    for image, labels in (dataset[i] for i in range(len(dataset))):
        confusion += confusion_matrix(segment(model, image, 0).cpu(), labels, classes)
    model.train(training)
    return Scores(confusion)


def table(classes: Sequence[str], columns: dict[str, Scores]) -> str:
    """The IoU of every class, one column for each of the named scores."""
    width = max(len(name) for name in classes) + 2
    lines = [f"{'class':<{width}}" + "".join(f"{title:>10}" for title in columns)]
    for i, name in enumerate(classes):
        lines.append(f"{name:<{width}}" + "".join(f"{scores.iou[i]:>10.3f}" for scores in columns.values()))
    return "\n".join(lines)
