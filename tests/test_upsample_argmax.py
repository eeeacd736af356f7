"""Label maps from upsampled logits that are never held whole."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from checks import poisoned
from operators import IMAGE_LAYOUTS, assert_same, compiled, dtypes, image_layouts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from upsample import CASES, EMPTY, check_labels, draw_logits

from segnext_kernels import upsample_argmax

reference = importlib.import_module("segnext_kernels.upsample_argmax.reference")


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest result of any operator that runs under it."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(out) if isinstance(value, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@dtypes
@pytest.mark.parametrize("layout", [*IMAGE_LAYOUTS, "sliced"])
@pytest.mark.parametrize(("shape", "size"), CASES + EMPTY, ids=str)
def test_agrees_with_float64(shape, size, layout, dtype, backend):
    check_labels(draw_logits(shape, dtype, layout), size, backend)


@pytest.mark.parametrize("strip", [1, 4000])
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def test_strips_of_the_reference(monkeypatch, shape, size, strip):
    monkeypatch.setattr(reference, "STRIP_ELEMENTS", strip)
    check_labels(draw_logits(shape, torch.float32), size, "reference")


@image_layouts
@dtypes
def test_the_lowest_of_equal_classes_wins(dtype, layout, backend):
    logits = draw_logits((2, 9, 3, 4), dtype, layout)
    logits[:, 6] = logits[:, 4]
    logits[:, 8] = -100
    found = check_labels(logits, (24, 31), backend)
    assert (found == 4).any() and not (found == 6).any() and not (found == 8).any()
    assert (upsample_argmax(torch.zeros_like(logits), (5, 5), backend=backend) == 0).all()


def test_nan_still_gives_a_class(backend):
    labels = upsample_argmax(torch.full((1, 3, 2, 2), torch.nan), (5, 5), backend=backend)
    assert ((labels >= 0) & (labels < 3)).all()


@image_layouts
@dtypes
@compiled
def test_same_bits_for_every_thread_count(dtype, layout, backend, set_threads):
    logits, answers = draw_logits((3, 21, 17, 9), dtype, layout), []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        answers.append(upsample_argmax(logits, (137, 70), backend=backend))
    assert_same(answers[1:], answers[:1] * 3)


@image_layouts
@dtypes
@compiled
def test_nothing_is_read_outside(dtype, layout, backend):
    for shape, size in CASES:
        logits = draw_logits(shape, dtype, layout)
        assert_same([upsample_argmax(poisoned(logits), size)], [upsample_argmax(logits, size)])


def test_compiles_for_any_size(backend):
    function = torch.compile(upsample_argmax, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape, size in (CASES[2], CASES[3], CASES[4]):
        logits = draw_logits(shape, torch.float32)
        assert_same([function(logits, size, backend=backend)], [upsample_argmax(logits, size, backend=backend)])


@compiled
def test_registration(backend):
    operator = torch.ops.segnext_kernels.upsample_argmax.default
    for layout in IMAGE_LAYOUTS:
        args = (draw_logits((2, 5, 4, 3), torch.float32, layout), 9, 11)
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def test_no_gradient_passes(backend):
    logits = draw_logits((1, 3, 4, 4), torch.float32).requires_grad_()
    assert not upsample_argmax(logits, (8, 8), backend=backend).requires_grad


def test_predict_never_holds_the_upsampled_logits():
    model, images = small.model(num_classes=200), torch.randn(1, 3, 64, 64)
    with LargestTensor() as seen:
        model.predict(images)
    assert 0 < seen.elements < 200 * 64 * 64 / 10


def test_a_masked_class_is_no_label(backend):
    """Where PyTorch's own interpolation has numbers: at the borders it makes NaN of infinities."""
    logits = torch.randn(1, 3, 6, 7)
    logits[:, 1] = -torch.inf
    labels = upsample_argmax(logits, (24, 28), backend=backend)
    inside = F.interpolate(logits, (24, 28), mode="bilinear")[:, 1] == -torch.inf
    assert inside.sum() > 300 and not (labels[inside] == 1).any()


BAD = {
    "no tensor": (lambda x: ([1.0], (4, 4)), TypeError, "logits must be a tensor, got list"),
    "integers": (lambda x: (x.long(), (4, 4)), TypeError, "got torch.int64"),
    "three dimensions": (lambda x: (x[0], (4, 4)), ValueError, r"logits must be \[N, C, h, w\], got shape \[3, 4, 4\]"),
    "one number": (lambda x: (x, (4,)), ValueError, r"size must be two whole numbers \(H, W\), got \(4,\)"),
    "negative": (lambda x: (x, (4, -1)), ValueError, r"size must be two whole numbers \(H, W\), got \(4, -1\)"),
    "bool": (lambda x: (x, (True, 4)), ValueError, "size must be two whole numbers"),
    "no sequence": (lambda x: (x, 5), ValueError, r"size must be two whole numbers \(H, W\), got 5"),
    "fraction": (lambda x: (x, (4, 2.5)), ValueError, "size must be two whole numbers"),
    "no classes": (lambda x: (x[:, :0], (4, 4)), ValueError, r"empty logits \[2, 0, 4, 4\] cannot be resized to \[4, 4\]"),
    "no pixels": (lambda x: (x[:, :, :0], (4, 4)), ValueError, r"empty logits \[2, 3, 0, 4\] cannot be resized"),
}


@pytest.mark.parametrize(("spoil", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(spoil, kind, message):
    with pytest.raises(kind, match=f"upsample_argmax: .*{message}"):
        upsample_argmax(*spoil(torch.zeros(2, 3, 4, 4)))


def test_sizes_may_be_numpys(backend):
    logits = torch.rand(1, 3, 4, 5)
    expected = upsample_argmax(logits, (8, 9), backend=backend)
    assert torch.equal(upsample_argmax(logits, (np.int64(8), np.int32(9)), backend=backend), expected)


def test_empty_labels_take_no_memory(backend):
    for shape, size in (((1, 3, 4, 4), (2**40, 0)), ((0, 3, 4, 4), (2**40, 1)), ((1, 3, 4, 4), (0, 2**40))):
        assert upsample_argmax(torch.rand(shape), size, backend=backend).shape == (shape[0], *size)


def test_no_classes_are_refused_for_empty_labels_too(backend):
    with pytest.raises(ValueError, match="empty logits"):
        upsample_argmax(torch.zeros(1, 0, 4, 4), (0, 4), backend=backend)
