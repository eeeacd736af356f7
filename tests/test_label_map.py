"""Label maps from upsampled logits that are never held whole."""

from __future__ import annotations

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segnext.model import label_map


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest result of any operator that runs under it."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(out) if isinstance(value, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (64, 48), (37, 101)], ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 6)], ids=str)
@pytest.mark.parametrize("strip", [1, 4000, 1 << 24])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_label_map_is_the_argmax_of_upsampled_logits(monkeypatch, size, grid, strip, dtype, tolerance):
    monkeypatch.setattr("segnext.model.STRIP_ELEMENTS", strip)
    logits = torch.randn(2, 6, *grid, generator=torch.Generator().manual_seed(0), dtype=dtype)
    upsampled = F.interpolate(logits.double(), size, mode="bilinear", align_corners=False)
    found = label_map(logits, size)
    assert found.shape == (2, *size) and found.dtype == torch.int64
    shortfall = upsampled.amax(1) - upsampled.gather(1, found[:, None])[:, 0]
    assert shortfall.max() < tolerance


def test_label_map_takes_more_than_256_classes():
    logits = torch.zeros(1, 300, 2, 2)
    logits[:, 299] = 1
    assert (label_map(logits, (5, 5)) == 299).all()


def test_predict_never_holds_the_upsampled_logits(monkeypatch):
    monkeypatch.setattr("segnext.model.STRIP_ELEMENTS", 4000)
    model, images = small.model(num_classes=200), torch.randn(1, 3, 64, 64)
    with LargestTensor() as seen:
        model.predict(images)
    assert 0 < seen.elements < 200 * 64 * 64 / 10
