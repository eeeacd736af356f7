"""What a training begins with, and must have kept to go on: the recipe with what it leaves open, the model, the classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import distributed
from .data.loader import mixed_seed, one_by_one
from .data.pairs import DataError, Pairs
from .data.workers import report_dead_workers
from .images import image_size
from .model import SegNeXt, create
from .recipes import LEAST_SIDE, Recipe, RecipeError, show_as
from .trainer import precision
from .weights import WeightsError, check, load, load_encoder

LARGEST = 512  # short side and crop of training on one's own pictures, which may be larger
# Fields of the recipe that cannot change once a training has begun
FIXED = ("dataset", "train", "size", "head", "rank", "encoder", "weights", "dropout", "drop_path", "seed")
COUNTED = 500  # pictures whose labels are counted for class weights


def resolved(recipe: Recipe, pairs: Pairs, device: torch.device) -> Recipe:
    """The recipe with what it leaves to the data and the device, and with files where they are found from any folder."""
    if recipe.scale is None:
        sizes = [sorted(image_size(image)) for image, _ in pairs.files[:: math.ceil(len(pairs) / COUNTED)]]
        short = max(LEAST_SIDE, min(LARGEST, sorted(low for low, _ in sizes)[len(sizes) // 2]))
        length = sorted(high / low for low, high in sizes)[len(sizes) // 2]  # of panoramas more than the paper's 4
        recipe = replace(recipe, scale=(math.ceil(max(4.0, length) * short), short))
    if recipe.crop is None:
        side = min(LARGEST, max(32, min(recipe.scale) // 32 * 32))
        recipe = replace(recipe, crop=(side, side))
    files = {name: getattr(recipe, name) for name in ("weights", "encoder")}
    files = {name: str(Path(file).absolute()) for name, file in files.items() if file and Path(file).is_file()}
    return replace(recipe, **files, precision=precision(recipe.precision, device))


def require_same(state: Mapping[str, Any], recipe: Recipe, pairs: Pairs, folder: Path, root: Path) -> None:
    """Raises a RecipeError where the training in the folder, which left ``state``, cannot be gone on with."""
    if list(state["meta"]["classes"]) != list(pairs.classes):
        raise RecipeError(f"the names of the classes in {root} are others than when the training in {folder} began")
    if (before := state.get("pictures", len(pairs))) != len(pairs) and distributed.rank() == 0:
        print(f"{root} has {len(pairs)} pictures where it had {before}: they come in another order from here on")
    fields = {name: (state["recipe"].get(name), getattr(recipe, name)) for name in FIXED}
    if changed := [f"{name} was {was} and is {now}" for name, (was, now) in fields.items() if was != now]:
        raise RecipeError(
            f"the recipe is another than when the training in {folder} began: {', '.join(changed)}; these cannot change"
        )


def build(recipe: Recipe, pairs: Pairs, before: Path | None = None) -> SegNeXt:
    """The recipe's model for the classes of a data set, on the CPU.

    Args:
        before: a checkpoint of a whole model to begin with; its classifier is replaced where the classes are others.

    Raises:
        WeightsError: the weights to begin with cannot be had or do not fit.
    """
    torch.manual_seed(mixed_seed(recipe.seed))
    count, weights = len(pairs.classes), before or recipe.weights
    begin = None if weights is None else load(weights, rank=recipe.rank)
    of_ham = ("rank", "gradient", "bases", "eval_steps")
    kept = {} if begin is None else {name: getattr(begin.config, name) for name in of_ham}
    if recipe.rank is not None:
        kept["rank"] = recipe.rank
    model = create(recipe.size, count, recipe.head, drop_path=recipe.drop_path, dropout=recipe.dropout, **kept)
    model.classes, model.palette = pairs.classes, pairs.palette
    show_as(model, recipe)
    if begin is not None:
        _take_over(model, begin, weights)
    elif recipe.encoder is not None:
        try:
            load_encoder(model, f"imagenet-{recipe.size}" if recipe.encoder == "imagenet" else recipe.encoder)
        except WeightsError as error:
            raise WeightsError(f"{error}; to train from random weights: --recipe scratch, or --encoder none") from error
    return model


def _take_over(model: SegNeXt, begin: SegNeXt, name: str | Path) -> None:
    """Gives the model the weights of another, but for the classifier if that one has other classes."""
    state = begin.state_dict()
    names = [None if classes is None else [one.strip() for one in classes] for classes in (begin.classes, model.classes)]
    if begin.config.num_classes != model.config.num_classes or names[0] not in (None, names[1]):
        if distributed.rank() == 0:
            print(f"the classes of {name} are others: its classifier is replaced by a new one")
        classifier = {key: value for key, value in model.state_dict().items() if key.startswith("decode_head.conv_seg.")}
        state.update(classifier)
    try:
        check(state, model, name)
    except WeightsError as error:
        raise WeightsError(f"a SegNeXt of other size or head than the recipe's: {error}") from error
    model.load_state_dict(state)


def label_counts(dataset: Dataset, workers: int = 0) -> Tensor:
    """How many pixels have every label, int64 [256], in up to 500 pictures, evenly spaced."""
    counts = torch.zeros(256, dtype=torch.int64)
    with report_dead_workers():
        for batch in one_by_one(dataset, range(0, len(dataset), math.ceil(len(dataset) / COUNTED)), workers):
            counts += torch.bincount(batch.labels.flatten(), minlength=256)
    return counts


def require_classes(counts: Tensor, classes: Sequence[str], pictures: int, data: str | Path) -> None:
    """Says which classes no pixel has, which often is the masks' fault: of 0 and 255, say, 255 is no class.

    Args:
        counts: of :func:`label_counts`.
        pictures: how many there are.
        data: what messages call them.

    Raises:
        DataError: all pictures were counted and there are no two classes in them, so nothing can be learned.
    """
    absent = [name for name, count in zip(classes, counts.tolist(), strict=False) if count == 0]
    if not absent or counts.sum() == 0:
        return
    ignored = 1 - (counts[: len(classes)].sum() / counts.sum()).item()
    named = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    told = f"{data}: no pixel of the masks that were counted is {named}; {ignored:.0%} of all are ignored"
    if len(absent) >= len(classes) - 1 and pictures <= COUNTED:
        raise DataError(f"{told}, so there are no two classes to tell apart")
    if distributed.rank() == 0:
        print(told)


def class_weights(dataset: Dataset, classes: Sequence[str], power: float, data: str | Path, workers: int = 0) -> Tensor | None:
    """Weights in the loss [classes], each class' share of the labels to the power of ``-power``; the mean label weighs 1.

    None for a power of 0: all weigh the same. The labels of up to 500 pictures, evenly spaced, are counted.

    Args:
        data: what messages call the data set; see :func:`require_classes`.
    """
    counts = label_counts(dataset, workers)
    require_classes(counts, classes, len(dataset), data)
    if power == 0:
        return None
    counts = counts[: len(classes)]
    shares = counts / counts.sum().clamp_min(1)
    weights = shares.clamp_min(1e-4) ** -power
    return weights / (shares * weights).sum().clamp_min(1e-4)
