"""What SegNeXt and SegFormer make of the same photographs, beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .checkpoint import WeightsError
from .data.ade20k import TABLE as ADE20K
from .data.cityscapes import TABLE as CITYSCAPES
from .data.coco_stuff import TABLE as COCO_STUFF
from .data.masks import identity_table, read_by_table
from .data.pairs import require_same_size
from .figure import at_width, figure, fitting_legend, model_title, require_new_png
from .fuse import inference_model
from .images import read_image, write_png
from .palette import IGNORED, generated_palette, overlay, photo_image
from .predict import InputError, class_names, least_side, require_photographs, segment
from .recipes import show_as
from .weights import load

SEGFORMERS = {
    f"segformer-b{i}": f"nvidia/segformer-b{i}-finetuned-ade-{size}-{size}" for i, size in enumerate([512] * 5 + [640])
}
MASKS = {"ade20k": ADE20K, "cityscapes": CITYSCAPES, "coco-stuff": COCO_STUFF}  # value in a mask file -> label
DIFFERENCES = {
    "only {1} is right": (0, 158, 115),
    "only {0} is right": (213, 94, 0),
    "neither is right, or unlabelled": (240, 228, 66),
}
LEAST = 32  # pixels of a side that a SegFormer can be shown


class Segformer(nn.Module):
    """A SegFormer of transformers with the interface of our models: normalised images [B, 3, H, W] to logits at stride 4."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def compare(
    inputs: Sequence[str | Path],
    truth: Sequence[str | Path],
    weights: str | Path,
    out: str | Path,
    *,
    other: str = "segformer-b2",
    dataset: str = "folder",
    differences: bool = False,
    rank: int | None = None,
    alpha: float = 0.7,
    short_side: int | None = None,
    width: int = 320,
    device: str | torch.device = "cpu",
) -> None:
    """Draws a figure: a row for every photo, with the labels of a SegFormer, ours and the true ones, and the classes' colours.

    Both models are shown the same: the photo resized to the scale that ours was trained on, through the windows of its recipe
    where that has them, normalised by ImageNet's mean and standard deviation; both models' logits are upsampled bilinearly to
    the photo's full size.

    Args:
        inputs, truth: image files, and as many mask files.
        weights, rank: as for :func:`segnext.load`.
        out: the figure, a PNG file.
        other: see :func:`load_segformer`.
        dataset: what a mask's values mean: those of a data set in ``MASKS``, or "folder", where they are the labels themselves
            and 255 is ignored.
        differences: a fourth column, with the pixels that the two models label differently, and which of them is right.
        alpha: how much of a picture is the classes' colour, 0..1.
        short_side: see :func:`segnext.predict.segment`; None for what our model was trained on.
        width: of a column of the figure in pixels, 0 for that of the widest photo.

    Raises:
        InputError: another number of masks than of photos, an unknown data set, a photo that is too small.
        DataError, ImageError: a photo or mask that cannot be read, or of another size than its partner.
        WeightsError: a model cannot be had, or the two have another number or order of classes.
    """
    photos, truth, out = list(map(Path, inputs)), list(map(Path, truth)), Path(out)
    require_new_png(out, [*photos, *truth])
    if len(photos) != len(truth):
        raise InputError(f"--truth takes a mask for each of the {len(photos)} photographs, not {len(truth)}")
    ours = load(weights, rank=rank)
    require_photographs(ours.config, weights)
    theirs = load_segformer(other)
    their_names = [theirs.model.config.id2label[number] for number in range(theirs.model.config.num_labels)]
    classes = class_names(ours, their_names)
    if theirs.model.config.num_labels != len(classes):
        raise WeightsError(
            f"{weights} tells {len(classes)} classes apart, {other} {theirs.model.config.num_labels}; they cannot be compared"
        )
    folded = [[name.casefold() for name in names] for names in (classes, their_names)]
    if folded[0] != folded[1] and sorted(folded[0]) == sorted(folded[1]):
        raise WeightsError(f"{weights} and {other} have the same classes in another order; they cannot be compared")
    table = _table(dataset, len(classes))
    palette = ours.palette or generated_palette(len(classes))
    show_as(theirs, ours)
    models = theirs.to(device), inference_model(ours, torch.device(device))
    rows, occurring = [], set()
    for photo, mask in zip(photos, truth, strict=True):
        image, labels = read_image(photo), read_by_table(mask, table)
        require_same_size(image, labels, mask)
        if least_side(ours, image, short_side) < LEAST:
            raise InputError(f"{photo}: a SegFormer cannot be shown less than {LEAST} pixels in height or width")
        maps = [*(segment(model, image, short_side).cpu() for model in models), labels.long()]
        row = [overlay(image, found, palette, alpha) for found in maps]
        row += [difference_image(image, *maps)] if differences else []
        rows.append([at_width(picture, width) for picture in row])
        occurring.update(*(found.unique().tolist() for found in maps))
    title = other.replace("segformer-b", "SegFormer-B") if other in SEGFORMERS else Path(other).name
    titles = [title, model_title(ours.config)]
    captions = [*titles, "Ground truth", *(["Differences"] if differences else [])]
    names, colours = zip(*((classes[label], palette[label]) for label in sorted(occurring - {IGNORED})), strict=True)
    if differences:
        names, colours = (*names, *(text.format(*titles) for text in DIFFERENCES)), (*colours, *DIFFERENCES.values())
    across = len(captions) * (width or max(row[0].width for row in rows))
    write_png(figure(rows, captions, width, below=fitting_legend(names, colours, across)), out)


def load_segformer(name: str) -> Segformer:
    """A SegFormer of transformers in evaluation mode, by a name in ``SEGFORMERS``, as a local folder, or by its id on the hub.

    Raises:
        InputError: nothing is called so.
        WeightsError: it cannot be fetched or read, or weights are missing in it.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers import SegformerForSemanticSegmentation
    from transformers.utils import logging

    local = Path(name).is_dir()
    if not local and name not in SEGFORMERS and "/" not in name:
        raise InputError(f"there is no model {name!r}: give a folder, an id of the hub, or one of {', '.join(SEGFORMERS)}")
    hub_logging.set_verbosity_error()  # or every attempt to connect is a line, and what is missing below a table
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, found = SegformerForSemanticSegmentation.from_pretrained(
            SEGFORMERS.get(name, name), output_loading_info=True, local_files_only=local
        )
    except Exception as error:  # a damaged folder or a lost connection can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        hint = "" if local else " (--with takes a local folder too)"
        raise WeightsError(f"{SEGFORMERS.get(name, name)} cannot be loaded as a SegFormer{hint}: {reason}") from error
    if found["missing_keys"]:
        raise WeightsError(f"{name} is no whole SegFormer: {sorted(found['missing_keys'])[0]} is missing in it")
    return Segformer(model).float().eval()


def difference_image(image: Tensor, theirs: Tensor, ours: Tensor, truth: Tensor) -> Image.Image:
    """The picture uint8 [3, H, W], pale and grey, under the colours of ``DIFFERENCES`` where two of its label maps differ.

    Args:
        theirs, ours, truth: labels [H, W].
    """
    pale = np.array(photo_image(image).convert("L").convert("RGB")) // 2 + 127
    differ = theirs != ours
    kinds = (differ & (ours == truth), differ & (theirs == truth), differ & (ours != truth) & (theirs != truth))
    for kind, colour in zip(kinds, DIFFERENCES.values(), strict=True):
        pale[kind.numpy()] = colour
    return Image.fromarray(pale)


def _table(dataset: str, classes: int) -> np.ndarray:
    """The labels of a mask's values."""
    if classes > IGNORED:
        raise InputError(f"the models tell {classes} classes apart; masks hold at most {IGNORED}")
    if dataset == "folder":
        return identity_table(classes)
    if dataset not in MASKS:
        raise InputError(f"masks of {dataset!r} are not known, only those of folder, {', '.join(MASKS)}")
    table = MASKS[dataset]
    count = len(np.setdiff1d(table, (-1, IGNORED)))
    if count != classes:
        raise InputError(f"masks of {dataset} have {count} classes, the models {classes}")
    return table
