"""The loss of upsampled logits against float64: values, gradients, weights, ignored pixels, what is kept and refused."""

from __future__ import annotations

import pytest
import torch
from checks import poisoned
from operators import HALVES, IMAGE_LAYOUTS, arrange, assert_same, compiled, dtypes, error, image_layouts
from torch._subclasses.fake_tensor import FakeTensorMode
from upsample import (
    CASES,
    EMPTY,
    IGNORED,
    check_loss,
    draw_logits,
    draw_target,
    exact_loss_and_gradient,
    loss_and_gradient,
)

from segnext_kernels import upsample_cross_entropy

SHAPE, SIZE = (2, 17, 9, 8), (37, 101)


def draw_weight(shape, dtype):
    drawn = torch.rand(shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return drawn.to(torch.float64 if dtype == torch.float64 else torch.float32) + 0.1


@dtypes
@pytest.mark.parametrize("layout", [*IMAGE_LAYOUTS, "sliced"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def test_agrees_with_float64(shape, size, weighted, layout, dtype, backend):
    logits = draw_logits(shape, dtype, layout)
    if layout == "sliced":  # an operator that copies answers in its own layout
        logits = logits.contiguous()
    check_loss(logits, draw_target(shape, size), draw_weight(shape, dtype) if weighted else None, backend)


@pytest.mark.parametrize(("shape", "size"), EMPTY, ids=str)
def test_without_pixels_it_is_zero(shape, size, backend):
    logits = draw_logits(shape, torch.float32)
    loss, grad = loss_and_gradient(logits, draw_target(shape, size), backend=backend)
    assert loss == 0 and grad.shape == logits.shape and (grad == 0).all()


@dtypes
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_where_all_is_ignored_it_is_zero(weighted, dtype, backend):
    logits = draw_logits(SHAPE, dtype)
    weight = draw_weight(SHAPE, dtype) if weighted else None
    loss, grad = loss_and_gradient(logits, torch.full((2, *SIZE), IGNORED), IGNORED, weight, backend=backend)
    assert loss == 0 and (grad == 0).all()


def test_class_weights_with_gaps_between_them(backend):
    weight = arrange(draw_weight(SHAPE, torch.float32), "sliced")
    check_loss(draw_logits(SHAPE, torch.float32), draw_target(SHAPE, SIZE), weight, backend)


def test_class_weights_get_no_gradient(backend):
    logits, weight = torch.randn(2, 3, 4, 5, requires_grad=True), torch.rand(3, requires_grad=True)
    upsample_cross_entropy(logits, torch.randint(3, (2, 8, 9)), weight=weight, backend=backend).backward()
    assert logits.grad is not None and weight.grad is None


def test_strided_logits_and_targets_of_other_integers(backend):
    logits, target = draw_logits(SHAPE, torch.float32, "sliced"), draw_target(SHAPE, SIZE)
    want = loss_and_gradient(logits.contiguous(), target, backend=backend)
    assert_same(loss_and_gradient(logits, target.byte(), backend=backend), want)
    assert_same(loss_and_gradient(logits, target.int().mT.contiguous().mT, backend=backend), want)


@pytest.mark.parametrize("ignored", [-100, 0, 3, 1000])
def test_any_label_can_be_the_ignored_one(ignored, backend):
    logits, target = draw_logits(SHAPE, torch.float64), draw_target(SHAPE, SIZE)
    want = loss_and_gradient(logits, target.where(target != ignored, IGNORED), backend=backend)
    got = loss_and_gradient(logits, target.where(target != IGNORED, ignored), ignored, backend=backend)
    assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_class(dtype, backend):
    """By the least number that there is, of which there are no multiples; never the label of a pixel."""
    logits, target = draw_logits(SHAPE, dtype), draw_target(SHAPE, SIZE)
    logits[:, 0] = torch.finfo(dtype).min
    check_loss(logits, torch.where(target == 0, IGNORED, target), backend=backend)


@pytest.mark.parametrize("large", [1e3, 1e30])
def test_large_logits_do_not_overflow(large, backend):
    logits, target = draw_logits(SHAPE, torch.float32) * large, draw_target(SHAPE, SIZE)
    loss, grad = loss_and_gradient(logits, target, backend=backend)
    want, _ = exact_loss_and_gradient(logits, target, IGNORED, None)
    assert error(loss, want) < 1e-6
    assert 0 < grad.abs().max() < 1 and grad.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("label", [-1, 17, 256, 1 << 40])
def test_labels_out_of_range_are_an_error(label, backend):
    logits, target = draw_logits(SHAPE, torch.float32), draw_target(SHAPE, SIZE)
    target[1, 20, 30] = label
    with pytest.raises((RuntimeError, IndexError), match="range|out of bounds"):
        upsample_cross_entropy(logits, target, backend=backend)


@compiled
def test_labels_out_of_range_are_named(backend):
    with pytest.raises(RuntimeError, match=r"target has labels that are neither ignore_index nor in the range \[0, 17\)"):
        upsample_cross_entropy(draw_logits(SHAPE, torch.float32), torch.full((2, 5, 5), 17))


def test_gradcheck(backend):
    logits, target = draw_logits((2, 3, 3, 4), torch.float64), draw_target((2, 3), (7, 9))
    weight = draw_weight((2, 3), torch.float64)
    for given in (None, weight):
        torch.autograd.gradcheck(
            lambda x, w=given: upsample_cross_entropy(x, target, IGNORED, w, backend=backend), logits.requires_grad_()
        )


@image_layouts
@dtypes
@compiled
def test_same_bits_for_every_thread_count(dtype, layout, backend, set_threads):
    shape, answers = (3, 21, 17, 9), []
    logits, target = draw_logits(shape, dtype, layout), draw_target(shape, (137, 70))
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        answers.append(loss_and_gradient(logits, target, backend=backend))
    for answer in answers[1:]:
        assert_same(answer, answers[0])


@image_layouts
@dtypes
@compiled
def test_nothing_is_read_outside(dtype, layout, backend):
    for shape, size in CASES:
        logits, target = draw_logits(shape, dtype, layout), draw_target(shape, size)
        dirty = torch.full((target.numel() + 8192,), 1 << 40)[4096:-4096].view_as(target).copy_(target)
        assert_same(loss_and_gradient(poisoned(logits), dirty), loss_and_gradient(logits, target))


@image_layouts
@compiled
def test_keeps_only_its_arguments(layout, backend):
    logits, target = draw_logits(SHAPE, torch.float32, layout).requires_grad_(), draw_target(SHAPE, SIZE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        upsample_cross_entropy(logits, target)
    assert set(kept) <= {logits.data_ptr(), target.data_ptr()}


@compiled
def test_no_double_backward(backend):
    logits = draw_logits(SHAPE, torch.float32).requires_grad_()
    loss = upsample_cross_entropy(logits, draw_target(SHAPE, SIZE))
    (grad,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="upsample_cross_entropy has no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler, backend):
    torch._dynamo.reset()

    def function(logits, target, weight):
        return upsample_cross_entropy(logits * 2, target, IGNORED, weight, backend=backend)

    compiled_function = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for shape, size in (CASES[2], CASES[3], CASES[9]):
        target, weight = draw_target(shape, size), draw_weight(shape, torch.float32)
        answers = []
        for f in (compiled_function, function):
            logits = draw_logits(shape, torch.float32).requires_grad_()
            loss = f(logits, target, weight)
            answers.append((loss.detach(), *torch.autograd.grad(loss, logits)))
        for got, want in zip(*answers, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=4e-6 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_changes_nothing(dtype, backend):
    logits, target = draw_logits(SHAPE, torch.float32), draw_target(SHAPE, SIZE)
    with torch.autocast("cpu", dtype=dtype):
        got = loss_and_gradient(logits, target, backend=backend)
    assert_same(got, loss_and_gradient(logits, target, backend=backend))


@image_layouts
def test_fake_tensors(layout, backend):
    for dtype in (torch.bfloat16, torch.float64):
        logits, target = draw_logits(SHAPE, dtype, layout), draw_target(SHAPE, SIZE)
        real = loss_and_gradient(logits, target, backend=backend)
        with FakeTensorMode() as mode:
            fake = loss_and_gradient(mode.from_tensor(logits), mode.from_tensor(target), backend=backend)
        assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


@image_layouts
@compiled
def test_registration(layout, backend):
    logits, target = draw_logits((2, 5, 4, 3), torch.float32, layout), draw_target((2, 5), (9, 11))
    operators, weight = torch.ops.segnext_kernels, draw_weight((2, 5), torch.float32)
    for given in (None, weight):
        torch.library.opcheck(operators.upsample_cross_entropy.default, (logits.requires_grad_(), target, given, IGNORED))
        backward = (torch.tensor(2.0), logits.detach(), target, given, IGNORED)
        torch.library.opcheck(operators.upsample_cross_entropy_backward.default, backward)


BAD = {
    "no tensor": (lambda x, t: ([1.0], t), TypeError, "logits must be a tensor, got list"),
    "floating target": (lambda x, t: (x, t.float()), TypeError, "target must be an integer tensor, got torch.float32"),
    "probabilities": (lambda x, t: (x, t[:, None]), ValueError, r"target must be \[N, H, W\], got shape \[2, 1, 8, 8\]"),
    "fewer targets": (lambda x, t: (x, t[:1]), ValueError, r"the logits' 2 images, got shape \[1, 8, 8\]"),
    "no classes": (lambda x, t: (x[:, :0], t), ValueError, r"empty logits \[2, 0, 4, 4\] cannot be resized"),
    "ignored": (lambda x, t: (x, t, 2.5), TypeError, "ignore_index must be an int, got float"),
    "short weight": (lambda x, t: (x, t, 255, torch.ones(2)), ValueError, r"weight must be \[3\], got \[2\]"),
    "weight's dtype": (lambda x, t: (x, t, 255, torch.ones(3).double()), TypeError, "weight must be a float32 tensor"),
}


@pytest.mark.parametrize(("spoil", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(spoil, kind, message):
    with pytest.raises(kind, match=f"upsample_cross_entropy: .*{message}"):
        upsample_cross_entropy(*spoil(torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)))


@compiled
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_operator_without_checks_in_python_refuses_a_gradient_of_another_dtype(dtype, backend):
    """Of which it would read more bytes than there are."""
    logits, target = torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="grad_out must be one number on the CPU in the accumulator's dtype"):
        torch.ops.segnext_kernels.upsample_cross_entropy_backward(torch.ones((), dtype=dtype), logits, target, None, 255)


def test_no_classes_are_refused_for_empty_targets_too(backend):
    with pytest.raises(ValueError, match="empty logits"):
        upsample_cross_entropy(torch.zeros(1, 0, 4, 4), torch.zeros(1, 0, 4, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("served", ["reference", None])
def test_no_pixels_of_logits_that_are_not_finite(served):
    logits = torch.full((1, 3, 2, 2), torch.nan)
    assert upsample_cross_entropy(logits, torch.empty(1, 0, 5, dtype=torch.int64), backend=served) == 0
