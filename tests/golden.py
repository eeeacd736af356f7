"""The golden SegNeXt: values in float64 from mmsegmentation 1.2.2, with given bases and no dropout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from segnext.checkpoint import official
from segnext.model import Config, SegNeXt

_FILE = np.load(Path(__file__).parent / "data" / "segnext_tiny_ham.npz")
VALUES = {key: torch.from_numpy(_FILE[key]) for key in _FILE.files}
CONFIG = Config((8, 16, 40, 64), (1, 1, 2, 1), decoder_channels=64, rank=16, num_classes=7, drop_path=0.0, dropout=0.0)


def state_dict(layout: str = "mmsegmentation") -> dict[str, Tensor]:
    """The weights in float64, in the "official" or the "mmsegmentation" layout."""
    state = {key.removeprefix("state_dict/"): VALUES[key].clone() for key in VALUES if key.startswith("state_dict/")}
    return official(state) if layout == "official" else state


def write(path: Path, state: dict, meta: dict | None = None, **options) -> Path:
    """Writes a checkpoint in the format of the path's ending and returns the path."""
    if path.suffix == ".safetensors":
        save_file(state, path, None if meta is None else {"meta": json.dumps(meta)})
    else:
        torch.save({"state_dict": state, **({} if meta is None else {"meta": meta})}, path, **options)
    return path


def gradients() -> dict[str, Tensor]:
    """The gradients in training, under the official names."""
    prefix = "train/grad/"
    return official({key.removeprefix(prefix): VALUES[key] for key in VALUES if key.startswith(prefix)})


def model(dtype: torch.dtype = torch.float64) -> SegNeXt:
    """The model in training mode."""
    network = SegNeXt(CONFIG).to(dtype)
    network.load_state_dict(state_dict("official"))
    return network


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The images and the decomposition's bases."""
    return VALUES["input"].to(dtype), VALUES["bases"].to(dtype)


def loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of the upsampled logits over the labelled pixels."""
    labels = VALUES["labels"]
    upsampled = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled, labels, ignore_index=255)
