"""What is exported: the fused model as a program of torch.export, with our operators or with PyTorch's alone."""

from __future__ import annotations

import json
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import segnext_kernels
from segnext_kernels._select import INFERENCE_OPERATORS

from ..errors import SegnextError
from ..fuse import fuse
from ..model import MEAN, STD, SegNeXt
from ..recipes import shown

LEAST = 33  # pixels: of fewer the coarsest map has a single row or column, for which torch.export traces another program


class ExportError(SegnextError, RuntimeError):
    """A model cannot be exported in this way; the message says why in one sentence."""


class Deployed(nn.Module):
    """The fused model with its choices made: images [B, in_channels, H, W] to logits, or to int64 labels [B, H, W].

    The Ham head starts from the fixed bases of its seed, also where the model draws random ones.
    """

    def __init__(self, model: SegNeXt, labels: bool) -> None:
        super().__init__()
        self.model, self.labels = fuse(model), labels
        self.register_buffer("bases", fixed_bases(model))

    def forward(self, images: Tensor) -> Tensor:
        bases = None if self.bases is None else self.bases.expand(images.shape[0], -1, -1)
        logits = self.model(images, bases)
        return segnext_kernels.upsample_argmax(logits, images.shape[-2:]) if self.labels else logits


def fixed_bases(model: SegNeXt) -> Tensor | None:
    """What the decomposition of one image starts from [1, decoder_channels, rank]; None for the MSCA head."""
    if model.config.head != "ham":
        return None
    return model.decode_head.hamburger.ham.fixed_bases(model.config.decoder_channels)


def trace(model: SegNeXt, shape: tuple[int, ...], *, dynamic: bool = False, labels: bool = False) -> ExportedProgram:
    """The program of :class:`Deployed` for images of the shape, or of any batch, height and width, with our operators in it."""
    images = torch.zeros(shape, dtype=torch.float32)  # whatever the default is
    with torch.no_grad():
        return torch.export.export(
            Deployed(model, labels).eval(), (images,), dynamic_shapes=dynamic_shapes() if dynamic else None
        )


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """The same with PyTorch's own operators only: the references in place of ours."""
    references = {name: getattr(import_module(f"segnext_kernels.{name}.reference"), name) for name in INFERENCE_OPERATORS}
    references["upsample_argmax"] = _labels
    return program.run_decompositions(
        {getattr(torch.ops.segnext_kernels, name).default: reference for name, reference in references.items()}
    )


def _labels(logits: Tensor, height: int, width: int) -> Tensor:
    """Without the reference's loop over strips, which takes their number from the size."""
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False).argmax(1)


def metadata(model: SegNeXt, labels: bool) -> dict[str, str]:
    """What a file says of itself: its input and output in words, the rest that is known as JSON.

    The keys are input, output, mean and std (for three channels), classes, palette, and how the model is shown pictures (see
    :class:`segnext.SegNeXt`): scale, multiple (above 1), window and stride.
    """
    config = model.config
    facts = {"classes": model.classes, "palette": model.palette, **shown(model)}
    facts["multiple"] = model.multiple if model.multiple > 1 else None
    values = "normalised as in training"
    if config.in_channels == len(MEAN):
        facts |= {"mean": MEAN, "std": STD}
        values = "RGB in 0..1, minus mean, divided by std"
    output = "labels: int64 [batch, height, width]"
    if not labels:
        output = f"logits: float32 [batch, {config.num_classes}, height / 8, width / 8], rounded up"
    words = {"input": f"images: float32 [batch, {config.in_channels}, height, width], {values}", "output": output}
    return words | {name: json.dumps(value) for name, value in facts.items() if value is not None}


def dynamic_shapes() -> dict[str, dict[int, Dim]]:
    return {"images": {0: Dim("batch"), 2: Dim("height", min=LEAST), 3: Dim("width", min=LEAST)}}
