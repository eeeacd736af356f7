"""The Triton kernels on upsampled logits, as Triton's interpreter runs them on the CPU."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
import upsample
from checks import check_gradients_of_float32, poisoned
from operators import IMAGE_LAYOUTS, assert_same, gpu_dtypes, image_layouts, interpreted
from upsample import IGNORED, draw_logits, draw_target, exact_loss_and_gradient, loss_and_gradient

from segnext_kernels import _triton, upsample_argmax, upsample_cross_entropy

pytestmark = pytest.mark.skipif(_triton.failure is not None, reason=str(_triton.failure))
SHAPE, SIZE = (2, 5, 3, 4), (7, 5)  # two segments of two rows in an image, the last cut off
SEVERAL_BLOCKS = (1, 33, 2, 33), (3, 70)  # of classes and of columns
LOSSES = [case for case in upsample.CASES if math.prod(case[0] + case[1]) < 20_000]  # more is slow
LOSSES += [SEVERAL_BLOCKS, ((1, 150, 2, 1), (3, 2)), ((1, 17, 3, 4), (8, 21)), ((1, 4, 9, 2), (3, 7))]
KINDS = [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last"), (torch.float16, "contiguous")]
kinds = pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)


@pytest.fixture
def kernels():
    return importlib.import_module("segnext_kernels.upsample_cross_entropy.triton_backward")


def draw_weight(classes: int) -> torch.Tensor:
    return torch.rand(classes, generator=torch.Generator().manual_seed(3)) + 0.1


@interpreted
@pytest.mark.parametrize(("shape", "size"), upsample.CASES + upsample.EMPTY, ids=str)
def test_labels(shape, size, backend):
    dtype, layout = KINDS[sum(size) % 3]
    upsample.check_labels(draw_logits(shape, dtype, layout), size, backend)


@interpreted
@gpu_dtypes
@image_layouts
def test_labels_of_every_dtype_and_layout(dtype, layout, backend):
    upsample.check_labels(draw_logits(SHAPE, dtype, layout), SIZE, backend)


@interpreted
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_labels_read_nothing_outside(layout, backend):
    logits = draw_logits(SHAPE, torch.float32, layout)
    want = upsample_argmax(logits, SIZE, backend=backend)
    assert_same([upsample_argmax(poisoned(logits), SIZE, backend=backend)], [want])


@interpreted
@pytest.mark.parametrize(("shape", "size"), LOSSES, ids=str)
def test_loss(shape, size, backend):
    dtype, layout = KINDS[sum(size) % 3]
    weight = draw_weight(shape[1]) if size[0] % 2 else None
    upsample.check_loss(draw_logits(shape, dtype, layout), draw_target(shape, size), weight, backend)


@interpreted
@gpu_dtypes
@image_layouts
def test_loss_of_every_dtype_and_layout(dtype, layout, backend):
    upsample.check_loss(draw_logits(SHAPE, dtype, layout), draw_target(SHAPE, SIZE), draw_weight(SHAPE[1]), backend)


@interpreted
@pytest.mark.parametrize(("shape", "size"), upsample.EMPTY, ids=str)
def test_without_pixels_it_is_zero(shape, size, backend):
    logits = draw_logits(shape, torch.float32)
    loss, grad = loss_and_gradient(logits, draw_target(shape, size), backend=backend)
    assert loss == 0 and grad.shape == logits.shape and (grad == 0).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [(7, 8), (8, 4), (9, 10), (8, 2)])
def test_masked_logits_leave_the_gradients_beside_them(columns, dtype, backend):
    """Columns with fewer pixels than others compute beyond them, where the largest of numbers make nan."""
    logits = draw_logits((1, 3, 3, columns[0]), dtype=dtype)
    logits[:, 2, :, 1::2] = torch.finfo(dtype).min
    target = torch.randint(2, (1, 4, columns[1]), generator=torch.Generator().manual_seed(0))
    found, expected = (loss_and_gradient(logits, target, backend=name)[1] for name in (backend, "reference"))
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("weight", [None, torch.ones(5), torch.zeros(5)], ids=["equal", "weighted", "zero"])
def test_where_nothing_counts_it_is_zero(weight, backend):
    target = torch.full((2, *SIZE), IGNORED) if weight is None or weight.any() else draw_target(SHAPE, SIZE)
    loss, grad = loss_and_gradient(draw_logits(SHAPE, torch.float32), target, IGNORED, weight, backend=backend)
    assert loss == 0 and (grad == 0).all()


@interpreted
@pytest.mark.parametrize("ignored", [-100, 1, 1 << 40])
def test_any_label_can_be_the_ignored_one(ignored, backend):
    logits, target = draw_logits(SHAPE, torch.float32), draw_target(SHAPE, SIZE)
    want = loss_and_gradient(logits, target.where(target != ignored, IGNORED), backend=backend)
    assert_same(loss_and_gradient(logits, target.where(target != IGNORED, ignored), ignored, backend=backend), want)


@interpreted
@pytest.mark.parametrize("label", [-1, 5])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_labels_out_of_range_give_nan(label, weighted, backend):
    logits, target = draw_logits(SHAPE, torch.float32), draw_target(SHAPE, SIZE)
    target[1, 5, 3] = label
    loss, grad = loss_and_gradient(logits, target, IGNORED, draw_weight(5) if weighted else None, backend=backend)
    assert loss.isnan() and grad.isnan().all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_class(dtype, backend):
    """By the least number that there is, of which there are no multiples; never the label of a pixel."""
    logits, target = draw_logits(SHAPE, dtype), draw_target(SHAPE, SIZE)
    logits[:, 0] = torch.finfo(dtype).min
    upsample.check_loss(logits, torch.where(target == 0, IGNORED, target), backend=backend)


@interpreted
@pytest.mark.parametrize("large", [1e3, 1e30])
def test_large_logits_do_not_overflow(large, backend):
    logits, target = draw_logits(SHAPE, torch.float32) * large, draw_target(SHAPE, SIZE)
    loss, grad = loss_and_gradient(logits, target, backend=backend)
    want, _ = exact_loss_and_gradient(logits, target, IGNORED, None)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    assert 0 < grad.abs().max() < 1 and grad.sum(1).abs().max() < 1e-6


@interpreted
@kinds
def test_nothing_is_read_outside(dtype, layout, backend):
    logits, target, weight = draw_logits(SHAPE, dtype, layout), draw_target(SHAPE, SIZE), draw_weight(5)
    dirty = torch.full((target.numel() + 8192,), 1 << 40)[4096:-4096].view_as(target).copy_(target)
    want = loss_and_gradient(logits, target, IGNORED, weight, backend=backend)
    assert_same(loss_and_gradient(poisoned(logits), dirty, IGNORED, poisoned(weight), backend=backend), want)


@interpreted
@pytest.mark.parametrize("size", [SIZE, (2, 3), (20, 1)], ids=str)
def test_strips_change_no_bit(size, kernels, backend, monkeypatch):
    """From all rows at once to one at a time; what a strip's buffers hold before, here nan, is not read."""
    logits, target = draw_logits(SHAPE, torch.float32), draw_target(SHAPE, size)
    want = loss_and_gradient(logits, target, backend=backend)
    empty, strips = torch.empty, kernels.strips
    counts = []

    def filled(*args, dtype, device):
        return empty(*args, dtype=dtype, device=device).fill_(torch.nan if dtype.is_floating_point else 3)

    def with_room(shape, size, itemsize):
        plan = strips(shape, size, room)
        counts.append(-(-shape[0] * plan.segments // plan.together))
        return plan

    monkeypatch.setattr(kernels.torch, "empty", filled)
    monkeypatch.setattr(kernels, "strips", with_room)
    for room in (1 << 20, 12, 1):  # noqa: B007  read by with_room
        assert_same(loss_and_gradient(logits, target, backend=backend), want)
    assert counts[0] == 1 < counts[2] == 6 and counts[0] <= counts[1]


def test_backward_takes_no_more_than_the_logits(kernels):
    for shape, size in [((16, 150, 64, 64), (512, 512)), ((16, 19, 64, 64), (512, 512)), ((16, 2, 64, 64), (512, 512))]:
        for itemsize in (2, 4):
            assert kernels.strips(shape, size, itemsize).bytes <= math.prod(shape) * itemsize
    assert kernels.strips((1, 150, 64, 64), (512, 512), 4).segment == 2  # a row more for every program to compute twice
    assert kernels.strips((16, 150, 64, 64), (512, 512), 4).together == 16 * 8


@interpreted
@pytest.mark.parametrize(("shape", "size"), [((2, 33, 6, 5), (13, 7)), ((1, 120, 3, 9), (3, 20))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_backward_allocates(shape, size, dtype, kernels, backend, monkeypatch):
    allocated, empty = [], torch.empty
    monkeypatch.setattr(
        kernels.torch, "empty", lambda *args, **kwargs: allocated.append(empty(*args, **kwargs)) or allocated[-1]
    )
    logits, target = draw_logits(shape, dtype), draw_target(shape, size)
    operators = torch.ops.segnext_kernels_triton
    operators.upsample_cross_entropy_backward(torch.tensor(1.0), logits, target, None, IGNORED)
    taken = sum(tensor.nbytes for tensor in allocated)
    assert taken == kernels.strips(shape, size, logits.element_size()).bytes <= logits.nbytes


def test_strips_hold_every_pixel(kernels):
    """The bound on the output rows of a strip against the rows themselves."""
    for images, rows, height, itemsize in itertools.product((1, 3), (1, 2, 5, 9), (1, 3, 8, 37), (1, 4, 9, 200)):
        begins = [
            [max(-(-((2 * i + 1) * height - rows) // (2 * rows)), 0) if i else 0 for i in range(rows)] for _ in range(images)
        ]
        flat = [n * height + min(y, height) for n in range(images) for y in begins[n]] + [images * height]
        plan = kernels.strips((images, 7, rows, 3), (height, 4), itemsize)
        for first in range(0, images * plan.segments, plan.together):
            last = min(first + plan.together, images * plan.segments) - 1
            start = first // plan.segments * rows + max(first % plan.segments * plan.segment - 1, 0)
            end = last // plan.segments * rows + min((last % plan.segments + 1) * plan.segment, rows)
            assert (flat[end] - flat[start]) * 6 <= plan.places  # four columns have six places


@interpreted
def test_only_the_gradient_is_computed_that_is_needed(backend):
    logits, target = draw_logits(SHAPE, torch.float32), draw_target(SHAPE, SIZE)
    want = loss_and_gradient(logits, target, backend=backend)
    assert not upsample_cross_entropy(logits, target, backend=backend).requires_grad
    leaf = logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        loss = upsample_cross_entropy(leaf, target, IGNORED, draw_weight(5).requires_grad_(), backend=backend)
    assert len(kept) == 3 and {logits.data_ptr(), target.data_ptr()} < set(kept)
    (grad,) = torch.autograd.grad(2.5 * upsample_cross_entropy(leaf, target, backend=backend), leaf)
    assert loss.isfinite()
    assert_same([grad], want[1:])


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_show_in_the_gradient(bad, backend):
    logits = draw_logits((1, 3, 4, 4), torch.float32)
    logits[0, 1, 2, 1] = bad
    loss, grad = loss_and_gradient(logits, draw_target((1, 3, 4, 4), (8, 8)), backend=backend)
    _, want = loss_and_gradient(logits, draw_target((1, 3, 4, 4), (8, 8)), backend="reference")
    assert not loss.isfinite()
    assert not grad[~want.isfinite()].isfinite().any() and grad[:, :, 0].isfinite().all()


@interpreted
def test_gradcheck(backend):
    target = draw_target((1, 3, 2, 3), (5, 7))
    logits = draw_logits((1, 3, 2, 3), torch.float32)
    check_gradients_of_float32(lambda z: upsample_cross_entropy(z, target, backend=backend), (logits,))


@interpreted
def test_no_double_backward(backend):
    logits = draw_logits(SHAPE, torch.float32).requires_grad_()
    loss = upsample_cross_entropy(logits, draw_target(SHAPE, SIZE), backend=backend)
    (grad,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="upsample_cross_entropy has no second derivative"):
        grad.square().sum().backward()


@interpreted
def test_autocast_changes_nothing(backend):
    logits, target = draw_logits(SHAPE, torch.float32), draw_target(SHAPE, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_and_gradient(logits, target, backend=backend)
    assert_same(got, loss_and_gradient(logits, target, backend=backend))


@interpreted
@image_layouts
def test_registration(layout, backend):
    logits, target = draw_logits((1, 3, 2, 2), torch.float32, layout), draw_target((1, 3), (3, 2))
    operators = torch.ops.segnext_kernels_triton
    weight = None if layout == "contiguous" else draw_weight(3)
    torch.library.opcheck(operators.upsample_cross_entropy.default, (logits.requires_grad_(), target, weight, IGNORED))
    backward = (torch.tensor(2.0), logits.detach(), target, weight, IGNORED)
    torch.library.opcheck(operators.upsample_cross_entropy_backward.default, backward)
    torch.library.opcheck(operators.upsample_argmax.default, (logits.detach(), 3, 2))
