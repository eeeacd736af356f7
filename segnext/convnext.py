"""The ConvNeXt of torchvision that Grad-CAM is compared with."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path

import torch
from torchvision.models import ConvNeXt, get_model, get_model_weights

from .checkpoint import WeightsError, read
from .weights import check, locate

CONVNEXTS = {f"convnext_{size}": f"ConvNeXt-{size[0].upper()}" for size in ("tiny", "small", "base", "large")}


def imagenet_classes() -> list[str]:
    """ImageNet's 1000, in the order of the labels."""
    return list(get_model_weights("convnext_tiny").DEFAULT.meta["categories"])


def load_convnext(name: str, weights: str | Path | None = None) -> ConvNeXt:
    """A ConvNeXt of torchvision in evaluation mode.

    Args:
        name: one of ``CONVNEXTS``.
        weights: file with its state; None for torchvision's own, fetched once and kept in torch.hub's folder.

    Raises:
        WeightsError: they cannot be fetched or read, or do not fit.
    """
    if weights is None:
        official = get_model_weights(name).DEFAULT
        try:
            state = official.get_state_dict(progress=True, check_hash=True)
        except (OSError, HTTPException, RuntimeError) as error:
            reason = getattr(error, "reason", error)
            hint = "--compare-weights takes a file that you have"
            raise WeightsError(f"cannot fetch {official.url}: {reason}; {hint}") from error
    else:
        path = Path(weights)
        state = {key.removeprefix("backbone."): value for key, value in read(locate(path))[0].items()}
        if state.get("classifier.2.weight", torch.empty(0)).dim() != 2:
            raise WeightsError(f"{path} holds no ConvNeXt of torchvision: classifier.2.weight is missing or misshapen")
    model = get_model(name, weights=None, num_classes=len(state["classifier.2.weight"]))
    check(state, model, weights or name)
    model.load_state_dict(state)
    return model.eval()
