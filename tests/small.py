"""A small SegNeXt with random weights, for the tests of everything around the model."""

from __future__ import annotations

from dataclasses import replace

import golden
import torch

from segnext.model import SegNeXt

CONFIG = replace(golden.CONFIG, dropout=0.1, drop_path=0.1)


def model(seed: int = 0, **changes) -> SegNeXt:
    """The model in evaluation mode, its configuration changed as told."""
    torch.manual_seed(seed)
    return SegNeXt(replace(CONFIG, **changes)).eval()
