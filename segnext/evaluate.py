"""Pixel accuracy and intersection over union on a labelled data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from . import distributed
from .checkpoint import WeightsError, check_file, check_folder, replacing
from .data import Pairs, open_dataset
from .data.loader import one_by_one
from .data.workers import report_dead_workers
from .fuse import inference_model
from .images import write_png
from .model import SegNeXt
from .palette import comparison
from .palette import legend as drawn_legend
from .predict import SCALE, holds_any, require_photographs, tell_scale
from .recipes import Recipe, RecipeError, asked_of_shown
from .views import MULTI_SCALE, View, label_map
from .weights import load

PLAIN = View()


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says: int64 [C, C], its rows the truth, its columns the prediction, counts of pixels.

    The meanings are mmsegmentation's.
    """

    confusion: Tensor

    @property
    def pixel_accuracy(self) -> float:
        """The share of labelled pixels that are right; nan without any."""
        return (self.confusion.trace() / self.confusion.sum()).item()

    @property
    def accuracy(self) -> Tensor:
        """The share of every class' pixels that are right [C]; nan for a class that is not in the truth."""
        return self.confusion.diagonal() / self.confusion.sum(1)

    @property
    def mean_accuracy(self) -> float:
        """The mean of the classes' accuracies, leaving out those that are nan."""
        return self.accuracy.nanmean().item()

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
        seen, count = int((self.confusion.sum(1) > 0).sum()), len(self.confusion)
        told = "" if seen == count else f" (only {seen} of {count} classes are in the pictures)"
        return f"mIoU {self.miou:.3f}, pixel accuracy {self.pixel_accuracy:.3f}{told}"


def confusion_matrix(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts of pixels, int64 [classes, classes], for every true (row) and predicted (column) label; truth 255 is left out."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # whose import takes 2 to 4 seconds

    assigned = truth.clamp(max=classes)  # one more class for 255, since torchmetrics takes three times as long to leave it out
    with algorithms(deterministic=False):  # counts are exact in any order; else torchmetrics takes pixels * classes^2 numbers
        return multiclass_confusion_matrix(prediction, assigned, classes + 1, validate_args=False)[:classes, :classes]


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """PyTorch's operators are deterministic within the block, or need not be."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    classes: int,
    view: View = PLAIN,
    *,
    workers: int | None = None,
    progress: bool = False,
    look: Callable[[str, Tensor, Tensor, Tensor], None] | None = None,
) -> Scores:
    """Scores of a model on (uint8 [3, H, W], labels [H, W]) pairs of any sizes, one after another, at their full size.

    Under torchrun every process takes its share of the pictures, and all return the scores of all of them.

    Args:
        model: for images [1, 3, H, W]; all of its modules are in the mode afterwards in which they were.
        dataset: labels beyond the classes are not counted, as 255.
        view: how the model is shown a picture.
        workers: processes that read pictures; 0 reads in this one. None for 2 with a GPU, and none on the CPU, all of which the
            model uses.
        progress: shows a bar.
        look: called with every picture's name, image, labels and predicted labels.

    Raises:
        DataError, ImageError: a picture cannot be read.
    """
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    mine = range(distributed.rank(), len(dataset), distributed.world_size())
    names = None if look is None else dataset.names
    stream = one_by_one(dataset, mine, (2 if device.type == "cuda" else 0) if workers is None else workers)
    model.eval()
    try:
        with report_dead_workers():
            for batch in tqdm(stream, total=len(mine), disable=None if progress else True, unit="photo", leave=False):
                prediction, truth = label_map(model, batch.images[0], view), batch.labels[0]
                confusion += confusion_matrix(prediction, truth.to(device), classes)
                if look is not None:
                    look(names[batch.indices[0]], batch.images[0], truth, prediction)
    finally:
        for module, mode in training.items():
            module.training = mode
    return Scores(distributed.all_reduce_sum(confusion).cpu())


def view_of(recipe: Recipe, multi_scale: bool = False, flip: bool = False) -> View:
    """How a recipe's model is tested."""
    ratios = MULTI_SCALE if multi_scale else (1.0,)
    return View(recipe.scale, recipe.multiple, recipe.window, recipe.stride, ratios, flip)


def evaluate_weights(
    weights: str | Path,
    data: str | Path,
    recipe: Recipe,
    *,
    shown: Mapping[str, Any] | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    rank: int | None = None,
    json_file: str | Path | None = None,
    pictures: str | Path | None = None,
) -> Scores:
    """Evaluates a checkpoint on a recipe's data set, prints a table and writes the figures and pictures that were asked for.

    Args:
        weights, rank: as for :func:`segnext.load`.
        data: the data set's folder.
        recipe: its data set, split ``val``, scale and windows are used. Without a scale (the recipes "folder" and "scratch")
            pictures are shown as the checkpoint says, or at the paper's scale where it doesn't, as in prediction.
        shown: ``scale``, ``multiple``, ``window`` and ``stride`` (see :class:`segnext.SegNeXt`), in place of these.
        multi_scale, flip: look at every picture in six sizes, and mirrored.
        workers: as for :func:`evaluate`.
        json_file: gets the figures.
        pictures: folder that gets every picture, its truth and the prediction side by side.

    Raises:
        WeightsError: from :func:`segnext.load`, or the model has another number of classes than the data set, or the same in
            another order.
        DataError, ImageError: the data cannot be read.
        InputError: a model that is not for photographs.
        RecipeError: ``shown`` makes no sense, the pictures would replace the data's, or the file for the figures is a folder.
        OSError: nothing can be written there.
    """
    with distributed.processes(device) as device:
        told = recipe.scale or asked_of_shown(shown).get("scale")
        model, pairs, recipe = load_evaluation(weights, data, recipe, rank, shown)
        if told is None and distributed.rank() == 0:
            tell_scale(model, weights)
        if json_file is not None and distributed.rank() == 0:
            if Path(json_file).is_dir():
                raise RecipeError(f"{json_file} is a folder; name a file for the figures")
            check_file(Path(json_file))
        if pictures is not None:
            _outside(Path(pictures), pairs)
        count, view = len(pairs.classes), view_of(recipe, multi_scale, flip)
        look = None if pictures is None else _writer(Path(pictures), pairs.classes, pairs.palette)
        with distributed.explain_out_of_memory(device, f"--device cpu{', or without --multi-scale' if multi_scale else ''}"):
            scores = evaluate(
                inference_model(model, device), pairs, count, view, workers=workers, progress=distributed.rank() == 0, look=look
            )
        if distributed.rank() == 0:
            print(table(pairs.classes, {"IoU": scores.iou, "accuracy": scores.accuracy}))
            print(f"{scores}, mean accuracy {scores.mean_accuracy:.3f}, {len(pairs)} pictures")
            if json_file is not None:
                with replacing(Path(json_file)) as file:
                    file.write(json.dumps({"pictures": len(pairs), **as_dict(pairs.classes, scores)}, indent=1).encode())
        return scores


def load_evaluation(
    weights: str | Path,
    data: str | Path,
    recipe: Recipe,
    rank: int | None = None,
    shown: Mapping[str, Any] | None = None,
) -> tuple[SegNeXt, Pairs, Recipe]:
    """A checkpoint, what it is evaluated on, and the recipe with the scale for this; see :func:`evaluate_weights`."""
    pairs = open_dataset(recipe.dataset, Path(data), recipe.val or "val")
    model = load(weights, rank=rank)
    require_photographs(model.config, weights)
    count = len(pairs.classes)
    if model.config.num_classes != count:
        raise WeightsError(f"{weights} tells {model.config.num_classes} classes apart, {recipe.dataset} in {data} has {count}")
    _same_order(model.classes or pairs.classes, pairs.classes, weights, data)
    if recipe.scale is None:
        windows = {"window": model.window, "stride": model.stride} if recipe.window is None else {}
        recipe = replace(recipe, scale=model.scale or SCALE, multiple=max(recipe.multiple, model.multiple), **windows)
    return model, pairs, replace(recipe, **asked_of_shown(shown))


def _same_order(known: Sequence[str], classes: Sequence[str], weights: str | Path, data: str | Path) -> None:
    """Other names may be another spelling; the same names in another order are not."""
    pairs = [(i, *both) for i, both in enumerate(zip(known, classes, strict=True)) if both[0].strip() != both[1].strip()]
    if not pairs:
        return
    i, own, other = pairs[0]
    sentence = f"class {i} is {own!r} in {weights} and {other!r} in {data}"
    if sorted(name.strip() for name in known) == sorted(name.strip() for name in classes):
        raise WeightsError(f"{sentence}: the same classes in another order")
    if distributed.rank() == 0:
        print(f"{sentence}; {len(pairs)} of {len(classes)} names differ")


def as_dict(classes: Sequence[str], scores: Scores) -> dict[str, Any]:
    """The figures in the form that JSON takes; None for what is nan."""
    number = lambda value: None if value != value else round(float(value), 6)  # noqa: E731  nan differs from itself
    return {
        "mIoU": number(scores.miou),
        "mean_accuracy": number(scores.mean_accuracy),
        "pixel_accuracy": number(scores.pixel_accuracy),
        "classes": {
            name: {"IoU": number(iou), "accuracy": number(accuracy)}
            for name, iou, accuracy in zip(classes, scores.iou.tolist(), scores.accuracy.tolist(), strict=True)
        },
    }


def table(classes: Sequence[str], columns: dict[str, Tensor]) -> str:
    """A line for every class, with its number from each of the named columns [C]."""
    width = max(len(name) for name in classes) + 2
    lines = [f"{'class':<{width}}" + "".join(f"{title:>10}" for title in columns)]
    for i, name in enumerate(classes):
        lines.append(f"{name:<{width}}" + "".join(f"{column[i]:>10.3f}" for column in columns.values()))
    return "\n".join(lines)


def _outside(folder: Path, pairs: Pairs) -> None:
    """Pictures are called as the data's images, which they must not replace, nor what these are links to."""
    files = {Path(file) for both in pairs.files for file in both if isinstance(file, str)}  # a mask may be something else
    if holds_any(folder, files):
        raise RecipeError(f"{folder} holds images or masks of the data; choose another folder for the pictures")


def _writer(folder: Path, classes: list[str], palette: list) -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """Writes a picture, its truth and the prediction side by side, as NAME.png in the folder."""
    key = drawn_legend(classes, palette, columns=5)
    check_folder(folder)

    def write(name: str, image: Tensor, truth: Tensor, prediction: Tensor) -> None:
        write_png(comparison(image, truth, prediction, palette, key), folder / f"{name.replace('/', '_')}.png")

    return write
