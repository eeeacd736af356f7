"""From photographs to label maps."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import recipes
from .checkpoint import check_folder
from .data.augment import fit_factor
from .distributed import explain_out_of_memory
from .errors import DeviceError, SegnextError
from .fuse import inference_model
from .images import ImageError, image_files, read_image, write_png
from .model import Config, SegNeXt
from .palette import generated_palette, legend, mask_image, overlay
from .views import MULTI_SCALE, View, label_map, resized
from .weights import load

LONGEST = 255  # bytes in the name of a file, on any file system that is common
SCALE = (2048, 512)  # the paper's, where the checkpoint does not say what the model was trained on


class InputError(SegnextError, RuntimeError):
    """Inputs that cannot be predicted on at all; the message says which and why."""


def predict(
    inputs: Sequence[str | Path],
    weights: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    alpha: float = 0.5,
    short_side: int | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    shown: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> list[Path]:
    """Segments image files and the images in folders; for each writes NAME_overlay.png and NAME_mask.png, once legend.png.

    Args:
        inputs: files, and folders of which every image directly inside is taken in order of its name.
        weights: what :func:`segnext.load` takes, with at most 256 classes.
        out: folder, made if it isn't there, and none of the inputs.
        rank: of the decomposition, in place of what the checkpoint says.
        alpha: how much of the overlay is the classes' colour, 0..1.
        short_side, multi_scale, flip: see :func:`segment`.
        shown: ``scale``, ``multiple``, ``window`` and ``stride`` (see :class:`segnext.SegNeXt`), in place of the checkpoint's.

    Returns:
        The files that could not be read, or for which memory was too small. Each was named on stderr and skipped.

    Raises:
        InputError: no inputs, results that would overwrite them, come among them or have too long names, a model that is not
            for photographs, ``shown`` beside ``short_side``, a ``short_side`` that is too small.
        RecipeError: ``shown`` makes no sense.
        WeightsError: from :func:`segnext.load`.
    """
    if shown and short_side is not None:
        raise InputError(f"--short-side shows photographs whole and at that size; it goes without --{next(iter(shown))}")
    _require_seen(short_side)
    photos, out = find_images(inputs), Path(out)
    names = unique_names(photos)
    if long := [photo for photo, name in zip(photos, names, strict=True) if len(os.fsencode(f"{name}_overlay.png")) > LONGEST]:
        raise InputError(f"{long[0]}: the names of its results would be longer than {LONGEST} bytes; rename it")
    results = {"legend.png"}.union(*({f"{name}_overlay.png", f"{name}_mask.png"} for name in names))
    for photo in photos:
        if photo.name in results and photo.resolve().parent == out.resolve():
            raise InputError(f"{photo} would be overwritten by a result; choose another folder than {out}")
    folders = {path.absolute() for path in map(Path, inputs) if path.is_dir()}
    if holds_any(out, [photo for photo in photos if photo.parent.absolute() in folders]):
        raise InputError(f"{out} holds photographs to look at; choose another folder for the pictures")
    model = load_for_photographs(weights, rank)
    asked = recipes.asked_of_shown(shown)
    if short_side is None and "scale" not in asked:
        tell_scale(model, weights)
    recipes.show_as(model, recipes.Recipe(**recipes.shown(model) | asked))  # which sees to it that they fit
    classes, palette = model.classes, model.palette
    model = inference_model(model, torch.device(device))
    check_folder(out)
    write_png(legend(classes, palette), out / "legend.png")
    broken = []
    with tqdm(total=len(photos), unit="photo", disable=None) as bar:
        for photo, name in zip(photos, names, strict=True):
            try:
                image = read_image(photo)
                with explain_out_of_memory(torch.device(device), f"a smaller --short-side for {photo}"):
                    labels = segment(
                        model, image, short_side, multi_scale=multi_scale, flip=flip, keep_larger="scale" not in asked
                    )
            except (ImageError, DeviceError) as error:
                broken.append(photo)
                bar.write(f"skipped: {error}", file=sys.stderr)
            else:
                write_png(overlay(image, labels, palette, alpha), out / f"{name}_overlay.png")
                write_png(mask_image(labels, palette), out / f"{name}_mask.png")
            bar.update()
    return broken


def load_for_photographs(weights: str | Path, rank: int | None = None) -> SegNeXt:
    """As :func:`segnext.load`; where the checkpoint has no names and colours of the classes, they are made up.

    Raises:
        InputError: a model whose labels of photographs an index-colour PNG cannot hold.
        WeightsError: from :func:`segnext.load`.
    """
    model = load(weights, rank=rank)
    require_photographs(model.config, weights)
    if model.config.num_classes > 256:
        raise InputError(f"{weights} tells {model.config.num_classes} classes apart; an index-colour PNG holds at most 256")
    model.classes = class_names(model)
    model.palette = model.palette or generated_palette(len(model.classes))
    return model


def tell_scale(model: SegNeXt, weights: str | Path) -> None:
    """Says so where nobody knows at which scale a model was trained."""
    if model.scale is None:
        print(f"{weights} does not say at which scale it was trained: pictures are resized to the paper's, {SCALE}")


def class_names(model, names: Sequence[str] = ()) -> list[str]:
    """The model's names of its classes, or else those given where they are as many, or else numbers."""
    count = model.config.num_classes
    return model.classes or (list(names) if len(names) == count else [f"class {i}" for i in range(count)])


def require_photographs(config: Config, weights: str | Path) -> None:
    """Raises an InputError where a model takes something else."""
    if config.in_channels != 3:
        raise InputError(f"{weights} takes {config.in_channels} channels; photographs have 3")


def segment(
    model: nn.Module,
    image: Tensor,
    short_side: int | None = None,
    *,
    multi_scale: bool = False,
    flip: bool = False,
    keep_larger: bool = True,
) -> Tensor:
    """The label map of one picture of any size, which the model is shown as evaluation by its recipe does.

    So the picture is resized to the scale that the model was trained on, or to the paper's where the model doesn't say that,
    and looked at through windows where the recipe has them. Where that scale is a window's, as of iSAID, whose training
    pictures were cut out of larger ones, pictures that are larger keep their size.

    Args:
        model: in eval mode; its device is used.
        image: uint8 [3, H, W].
        short_side: instead of all that, the model sees the picture whole, shrunk to this many pixels on its shorter side and at
            most four times as many on the longer, which bounds time and memory; smaller pictures are not enlarged, 0 leaves
            every size as it is.
        multi_scale, flip: look at the picture in six sizes, 0.5 to 1.75 times that, and mirrored.
        keep_larger: whether pictures that are larger than windows as large as the scale keep their size.

    Returns:
        Labels int64 [H, W], at the full size of the picture.

    Raises:
        InputError: ``short_side`` is below 8, and not 0.
    """
    view = _tested(model, image, short_side, keep_larger)
    return label_map(model, image, replace(view, ratios=MULTI_SCALE if multi_scale else (1.0,), flip=flip))


def segment_whole(model: nn.Module, image: Tensor, short_side: int | None = None) -> Tensor:
    """As :func:`segment`, of a picture that is shown whole, whatever windows the recipe has."""
    return label_map(model, image, _whole(model, image, short_side))


def least_side(model: nn.Module, image: Tensor, short_side: int | None = None) -> int:
    """The shortest side of what :func:`segment` shows the model of a picture, of the whole or of a window."""
    view = _tested(model, image, short_side)
    return min(*view.size(tuple(image.shape[-2:])), *(view.window or ()))


def seen(model: nn.Module, image: Tensor, short_side: int | None = None) -> Tensor:
    """What the model is given of a picture uint8 [3, H, W] that is shown whole: float32 [1, 3, h, w], on its device."""
    return resized(image[None].to(next(model.parameters()).device), seen_size(model, image, short_side))


def seen_size(model: nn.Module, image: Tensor, short_side: int | None = None) -> tuple[int, int]:
    """The (height, width) that :func:`seen` makes of a picture."""
    return _whole(model, image, short_side).size(tuple(image.shape[-2:]))


def _whole(model: nn.Module, image: Tensor, short_side: int | None) -> View:
    if short_side is None:
        return View(getattr(model, "scale", None) or SCALE, getattr(model, "multiple", 1))
    _require_seen(short_side)
    bound = (4 * short_side, short_side)
    return View(None if short_side == 0 or fit_factor(tuple(image.shape[-2:]), bound) >= 1 else bound)


def _require_seen(short_side: int | None) -> None:
    if short_side is not None and 0 < short_side < recipes.LEAST_SIDE:
        raise InputError(f"a short side of {short_side} is neither 0 nor at least {recipes.LEAST_SIDE} pixels")


def _tested(model: nn.Module, image: Tensor, short_side: int | None, keep_larger: bool = True) -> View:
    view, window = _whole(model, image, short_side), getattr(model, "window", None)
    if short_side is not None or window is None:
        return view
    larger = keep_larger and view.scale == window and fit_factor(tuple(image.shape[-2:]), window) < 1
    return replace(view, scale=None if larger else view.scale, window=window, stride=model.stride)


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """Files as they are, and in place of a folder the images directly inside, by name; each file once."""
    found: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = image_files(path)
            if not inside:
                raise InputError(f"{path}: there is no image in this folder")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    if not found:
        raise InputError("no photographs given")
    return list({path.absolute(): path for path in found}.values())


def holds_any(folder: Path, files: Iterable[Path]) -> bool:
    """Whether one of the files, or what it is a link to, lies in the folder itself."""
    return folder.resolve() in {place for file in files for place in (file.parent.resolve(), file.resolve().parent)}


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The files' names without their endings; where two are the same, later ones get _2, _3 ... that no other file has."""
    stems = {path.stem for path in paths}
    names: dict[str, None] = {}
    for path in paths:
        name, number = path.stem, 1
        while name in names or (number > 1 and name in stems):
            number += 1
            name = f"{path.stem}_{number}"
        names[name] = None
    return list(names)
