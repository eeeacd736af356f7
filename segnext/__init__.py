"""SegNeXt: semantic segmentation with convolutional attention, on the fused operators of segnext_kernels."""

from __future__ import annotations

from .classifier import Classifier
from .fuse import fuse
from .model import Config, SegNeXt, create, encoder
from .weights import WeightsError, load, load_classifier, load_encoder, save

__all__ = [
    "Classifier",
    "Config",
    "SegNeXt",
    "WeightsError",
    "create",
    "encoder",
    "fuse",
    "load",
    "load_classifier",
    "load_encoder",
    "save",
]
