"""Grad-CAM: where in a photograph a model finds a class."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, SemanticSegmentationTarget
from scipy import ndimage
from torch import Tensor, nn
from torchvision.models import ConvNeXt

from .checkpoint import WeightsError, read
from .classifier import Classifier
from .convnext import CONVNEXTS, imagenet_classes, load_convnext
from .figure import at_width, figure, for_each, model_title, require_new_png
from .images import read_image, write_png
from .model import SegNeXt
from .palette import photo_image
from .predict import InputError, class_names, find_images, require_photographs, seen, segment_whole
from .weights import load, load_classifier, locate

LAYERS = ("stage1", "stage2", "stage3", "stage4", "head")
CLASSIFIER_SIDE = 224  # pixels on the shorter side of what ImageNet's classifiers are trained on

Region = tuple[int, ...]  # x, y of a pixel, or left, top, right, bottom of a box, right and bottom not in it


def gradcam(
    inputs: Sequence[str | Path],
    weights: str | Path,
    out: str | Path,
    classes: Sequence[str] = (),
    *,
    layer: str = "stage4",
    regions: Sequence[Region] = (),
    compare: str | None = None,
    compare_classes: Sequence[str] = (),
    compare_weights: str | Path | None = None,
    rank: int | None = None,
    short_side: int | None = None,
    width: int = 320,
    device: str | torch.device = "cpu",
) -> None:
    """Draws a figure: a row for every photo, or for every class or region of one photo, with the photo, the map of a ConvNeXt
    where one is given, and ours.

    Args:
        inputs: files, and folders of which every image directly inside is taken in order of its name.
        weights: a checkpoint of a whole model, or of an ImageNet encoder with its classifier.
        out: the figure, a PNG file.
        classes: one for all rows or one for each, by name or number. A photo with a pixel as its region may go without: the
            class is then the one that the model sees there.
        layer: see :func:`heat_map`.
        regions: likewise, for a whole model: parts of the photo whose classification is explained, see :func:`heat_map`.
        compare: one of ``CONVNEXTS``, an ImageNet classifier.
        compare_classes: the class for it, where ImageNet calls it otherwise than our model does.
        compare_weights: file with its weights; None for torchvision's, which are fetched once.
        rank: of the decomposition, in place of what the checkpoint says.
        short_side: of what our model sees; None for what it was trained on. The ConvNeXt always sees 224 pixels.
        width: of a column of the figure in pixels, 0 for that of the widest photo.

    Raises:
        InputError: nothing to draw, an unknown class, a region outside of its photo, or options that don't fit the model.
        ImageError: a file that cannot be read.
        WeightsError: a checkpoint cannot be had or does not fit.
    """
    photos, out = find_images(inputs), Path(out)
    require_new_png(out, photos)
    if compare is None and (compare_classes or compare_weights is not None):
        raise InputError("--compare-class and --compare-weights go with --compare")
    given = {"photograph": photos, "class": classes, "region": regions, "class to compare": compare_classes}
    count = max(map(len, given.values()))
    each = [for_each(values, count, what) for what, values in given.items()]
    model = _load(weights, rank).to(device, memory_format=torch.channels_last)
    other = None
    if compare is not None:
        other = load_convnext(compare, compare_weights).to(device, memory_format=torch.channels_last)
    names = class_names(model, imagenet_classes())
    rows, titles = [], []
    for photo, name, region, other_name in zip(*each, strict=True):
        image = read_image(photo)
        category = _category(model, names, image, photo, name, region, short_side)
        row = [photo_image(image)]
        if other is not None:
            their_category = _their_category(other, names, category, other_name)
            row.append(heat_image(image, heat_map(other, image, their_category, "stage4" if layer == "head" else layer)))
        row.append(heat_image(image, heat_map(model, image, category, layer, region, short_side)))
        rows.append([at_width(picture, width) for picture in row])
        titles.append(names[category])
    ours = model_title(model.config, "SegNeXt" if isinstance(model, SegNeXt) else "MSCAN")
    captions = ["Image", *([] if compare is None else [CONVNEXTS[compare]]), ours]
    write_png(figure(rows, captions, width, titles=titles), out)


def heat_map(
    model: SegNeXt | Classifier | ConvNeXt,
    image: Tensor,
    category: int,
    layer: str = "stage4",
    region: Region | None = None,
    short_side: int | None = None,
) -> Tensor:
    """Where a model finds a class: relu(sum_k mean_xy(dS / dA_k) * A_k), upsampled and stretched to 0..1.

    A are the layer's activations. S is a classifier's logit of the class. Of a whole model it is the sum of the upsampled
    logits over the region's pixels, by default over those labelled as the class, or where there are none over all.

    Args:
        model: in evaluation mode; its parameters' gradients are gone afterwards.
        image: uint8 [3, H, W].
        category: the class' number.
        layer: one of ``LAYERS``: the normalised output of a stage of the encoder (of a ConvNeXt, the plain output), or "head":
            what a whole model's last convolution sees.
        region: of a whole model: a pixel, which means the connected pixels around it of one label, or a box.
        short_side: as for :func:`segnext.predict.segment_whole`; None for what the model was trained on, and 224 for
            classifiers.

    Returns:
        float32 [H, W] on the CPU, 0 where least and 1 where most speaks for the class; all 0 where nothing does.

    Raises:
        InputError: a region outside of the picture, or a region or the layer "head" for a classifier.
        TypeError: another model, a fused one for instance, which has no gradients.

    Source: Grad-CAM (ICCV 2017), equations 1 and 2; Seg-Grad-CAM (AAAI 2020) for sums over pixels. Computed by
        the package grad-cam.
    """
    if short_side is None and not isinstance(model, SegNeXt):
        short_side = CLASSIFIER_SIDE
    module, size = _layer(model, layer), tuple(image.shape[-2:])
    images = seen(model, image, short_side)
    if isinstance(model, SegNeXt):
        mask = _mask(segment_whole(model, image, short_side), category, region)
        logits_size = tuple(-(-side // 8) for side in images.shape[-2:])
        target = SemanticSegmentationTarget(category, _on_logits(mask, logits_size).numpy())
    elif region is not None:
        raise InputError("a region needs a model that segments; a classifier sees the picture as a whole")
    else:
        target = ClassifierOutputTarget(category)
    # Of the images, so that there is a gradient where the weights want none
    with torch.enable_grad(), GradCAM(model, [module]) as cam:
        found = torch.from_numpy(cam(images.requires_grad_(), [target]))
    model.zero_grad()
    return F.interpolate(found[None], size, mode="bilinear")[0, 0]


def heat_image(image: Tensor, heat: Tensor) -> Image.Image:
    """A picture uint8 [3, H, W] under its map [H, W], blue for 0 and red for 1."""
    return Image.fromarray(show_cam_on_image(image.permute(1, 2, 0).numpy() / np.float32(255), heat.numpy(), use_rgb=True))


def find_class(wanted: str, names: Sequence[str]) -> int:
    """The number of a class that is given by name, in any case, or else by number.

    Raises:
        InputError: there is none, or several of this name; it lists near or all of these.
    """
    folded = [name.strip().casefold() for name in names]
    found = [i for i, name in enumerate(folded) if name == wanted.strip().casefold()]
    if not found and wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"several classes are called {wanted!r}; give a number: {', '.join(map(str, found))}")
    word = re.compile(rf"\b{re.escape(wanted.strip().casefold())}\b")
    near = [*filter(word.search, folded), *get_close_matches(wanted.casefold(), folded, n=5)]
    listed = [names[folded.index(name)] for name in dict.fromkeys(near)][:8]
    hint = f"near it: {', '.join(listed)}" if listed else f"there are {len(names)}, as {', '.join(names[:5])}"
    raise InputError(f"there is no class {wanted!r}; {hint}")


def _load(weights: str | Path, rank: int | None) -> SegNeXt | Classifier:
    path = locate(weights)
    state, _ = read(path)
    model = load(path, rank=rank) if any(key.startswith("decode_head.") for key in state) else load_classifier(path)
    require_photographs(model.config, weights)
    return model


def _layer(model: nn.Module, layer: str) -> nn.Module:
    """The module whose output is meant."""
    if layer not in LAYERS:
        raise InputError(f"there is no layer {layer!r}; there are {', '.join(LAYERS)}")
    if not isinstance(model, (SegNeXt, Classifier, ConvNeXt)):
        raise TypeError(f"heat_map: model must be a SegNeXt, a Classifier or a ConvNeXt, got {type(model).__name__}")
    if layer == "head":
        if not isinstance(model, SegNeXt):
            raise InputError("a classifier has no layer head; its last is stage4")
        return model.decode_head.dropout
    stage = int(layer[-1])
    return model.features[2 * stage - 1] if isinstance(model, ConvNeXt) else getattr(model.backbone, f"norm{stage}")


def _mask(labels: Tensor, category: int, region: Region | None) -> Tensor:
    """The pixels that S sums over, bool [H, W], of the labels [H, W]."""
    if region is None:
        mask = labels == category
        return mask if mask.any() else torch.ones_like(mask)
    _require_inside(region, labels)
    if len(region) == 2:
        x, y = region
        parts, _ = ndimage.label((labels == labels[y, x]).cpu())
        return torch.from_numpy(parts == parts[y, x])
    left, top, right, bottom = region
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def _require_inside(region: Region, picture: Tensor) -> None:
    height, width = picture.shape[-2:]
    left, top, right, bottom = region if len(region) == 4 else (*region, region[0] + 1, region[1] + 1)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(f"the region {','.join(map(str, region))} is not inside of a picture of {width}x{height} pixels")


def _on_logits(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """What the logits [h, w] weigh in the sum of the upsampled logits over a mask [H, W]: bilinear upsampling transposed."""
    with torch.enable_grad():
        logits = torch.zeros(1, 1, *size, requires_grad=True)
        total = (F.interpolate(logits, mask.shape, mode="bilinear") * mask.cpu()).sum()
    return torch.autograd.grad(total, logits)[0][0, 0]


def _category(
    model: nn.Module,
    names: Sequence[str],
    image: Tensor,
    photo: Path,
    name: str | None,
    region: Region | None,
    short_side: int | None,
) -> int:
    """The class that a photo's map is of."""
    if region is not None:
        try:
            _require_inside(region, image)
        except InputError as error:
            raise InputError(f"{photo}: {error}") from None
    segments = isinstance(model, SegNeXt)
    if name is None and not (segments and region is not None and len(region) == 2):
        raise InputError("give a class (--class NAME), or a pixel whose class is meant (--region X,Y)")
    category = None if name is None else find_class(name, names)
    if segments and (category is None or region is None):
        labels = segment_whole(model, image, short_side)
        if category is None:
            return int(labels[region[1], region[0]])
        if not (labels == category).any():
            print(f"{photo}: no pixel is labelled {names[category]}; its map is of the whole picture", file=sys.stderr)
    return category


def _their_category(other: ConvNeXt, names: Sequence[str], category: int, name: str | None) -> int:
    """The number that the compared model has for a class."""
    count = other.classifier[-1].out_features
    if name is None and count == len(names):
        return category
    theirs = imagenet_classes()
    if count != len(theirs):
        raise WeightsError(f"the compared model tells {count} classes apart, neither ours nor ImageNet's 1000")
    try:
        return find_class(name or names[category], theirs)
    except InputError as error:
        raise InputError(f"of ImageNet's classes, for the compared model (--compare-class): {error}") from None
