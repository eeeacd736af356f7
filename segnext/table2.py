"""The paper's table 2 with what is measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.hub import tqdm  # shows less where tqdm is not installed

from . import complexity, recipes, speed
from .checkpoint import SAFETENSORS_SUFFIX, TORCH_SUFFIXES, WeightsError
from .model import SIZES

Model = tuple[str, str]  # size and head
Columns = dict[str, dict[Model, str]]


def table2(
    measured: bool = False,
    weights: Mapping[Model, str | Path] | None = None,
    data: str | Path | None = None,
    recipe: str = "ade20k",
    device: str = "cpu",
    workers: int | None = None,
) -> str:
    """Parameters and GFLOPs of the eight models, the paper's beside them, and what else is asked for.

    Args:
        measured: adds the latency and peak memory of :func:`segnext.speed.measure`, at 512x512 with 150 classes.
        weights: checkpoints of some of the models; adds their mIoU in per cent, in one size, and in six sizes and mirrored.
        data: the data set's folder, for these.
        recipe: whose data format and test mode are used.
        workers: as for :func:`segnext.evaluate.evaluate`.

    Raises:
        WeightsError: a checkpoint cannot be had, or is of another model.
        RecipeError, DataError, ImageError: no such recipe, data missing or broken.
    """
    if (data is None) == bool(weights):
        raise recipes.RecipeError("give both --weights and --data, on which they are evaluated, or neither")
    miou = miou_columns(weights, data, recipe, device, workers) if weights else {}
    return complexity.table2({**(speed_columns(device) if measured else {}), **miou})


def speed_columns(device: str = "cpu") -> Columns:
    """Milliseconds and MiB of every model."""
    found = {model: speed.measure(*model, device=device) for model in tqdm(complexity.PAPER, desc="measuring", leave=False)}
    return {
        "ms": {model: f"{1e3 * figures.seconds:.1f}" for model, figures in found.items()},
        "MiB": {model: f"{figures.bytes / 2**20:.0f}" for model, figures in found.items()},
    }


def miou_columns(
    weights: Mapping[Model, str | Path], data: str | Path, recipe: str, device: str = "cpu", workers: int | None = None
) -> Columns:
    """The mIoU of those models that there are weights of."""
    from .evaluate import evaluate, load_evaluation, view_of
    from .fuse import inference_model

    columns: Columns = {"mIoU SS": {}, "mIoU MS": {}}
    chosen = recipes.evaluation_recipe(recipe)
    for (size, head), file in weights.items():
        model, pairs, scaled = load_evaluation(file, data, chosen)
        expected = SIZES[size]
        if (model.config.channels, model.config.depths, model.config.head) != (expected.channels, expected.depths, head):
            raise WeightsError(f"{file} is no SegNeXt-{size.upper()} with the {head} head")
        model = inference_model(model, torch.device(device))
        for column, several in zip(columns.values(), (False, True), strict=True):
            view = view_of(scaled, multi_scale=several, flip=several)
            scores = evaluate(model, pairs, len(pairs.classes), view, workers=workers, progress=True)
            column[size, head] = f"{100 * scores.miou:.1f}"
    return columns


def in_folder(folder: Path) -> dict[Model, Path]:
    """The checkpoints in a folder that are called as t-ham.pth, b-msca.safetensors.

    Raises:
        WeightsError: there is none, or two of one model.
    """
    found: dict[Model, Path] = {}
    for model in complexity.PAPER:
        for file in (folder / f"{'-'.join(model)}{ending}" for ending in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)):
            if file.is_file() and found.setdefault(model, file) != file:
                raise WeightsError(f"{found[model]} and {file.name} are of one model; leave one of them")
    if not found:
        raise WeightsError(f"{folder}: there is no checkpoint with a name as t-ham.pth in this folder")
    return found
