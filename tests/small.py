"""A small SegNeXt with random weights and photographs of random patches, for the tests of everything around the model."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import golden
import numpy as np
import torch
from PIL import Image

from segnext.model import SegNeXt

CONFIG = replace(golden.CONFIG, dropout=0.1, drop_path=0.1)


def model(seed: int = 0, **changes) -> SegNeXt:
    """The model in evaluation mode, its configuration changed as told."""
    torch.manual_seed(seed)
    return SegNeXt(replace(CONFIG, **changes)).eval()


def labelling(classes: list[str], **changes) -> SegNeXt:
    """A model whose random weights are large enough for several of the classes to occur, and for all stages to matter."""
    network = model(num_classes=len(classes), **changes)
    torch.nn.init.normal_(network.decode_head.conv_seg.weight)
    network.classes = classes
    return network


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Patches of 8x8 pixels, so that the network sees something."""
    patches = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(patches, np.ones((8, 8, 1), np.uint8))[:height, :width])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
