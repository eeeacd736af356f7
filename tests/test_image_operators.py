"""What msca_strips and dwconv_gelu, the operators on images, must both do, whatever they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import checks
import pytest
import torch
from operators import (
    HALVES,
    IMAGE_LAYOUTS,
    Sample,
    arranged,
    assert_same,
    check,
    compiled,
    dtypes,
    dwconv_gelu_sample,
    grad_like,
    image_layouts,
    msca_strips_sample,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from segnext_kernels._register import operator

COMPILE_SHAPES = [(2, 5, 9, 12), (3, 5, 8, 31), (4, 5, 40, 7), (2, 5, 9, 12)]


@pytest.fixture(params=[msca_strips_sample, dwconv_gelu_sample], ids=["msca_strips", "dwconv_gelu"])
def sample_of(request) -> Callable[..., Sample]:
    """Makes a sample of the operator under test from the shape of x."""
    return request.param


@dtypes
@pytest.mark.parametrize("layout", ["sliced", "expanded", "transposed"])
def test_strides_that_are_copied(sample_of, layout, dtype, backend):
    sample = arranged(sample_of((3, 17, 6, 23)).to(dtype), layout)
    check(sample, backend, grad_like(sample.x))


@pytest.mark.parametrize("shape", [(2, 1, 5, 37), (2, 17, 1, 1), (2, 17, 1, 9), (1, 17, 9, 1), (2, 33, 7, 9)], ids=str)
@image_layouts
def test_layout_is_kept(sample_of, shape, layout, backend):
    checks.check_layout(arranged(sample_of(shape).to(torch.float32), layout), backend)


@pytest.mark.parametrize("strange", [False, True], ids=["channels_last", "transposed"])
def test_gradients_of_filters_have_their_strides(sample_of, strange, backend):
    """As autograd promises, and DistributedDataParallel wants; but for filters that are not in contiguous order."""
    x, *filters = sample_of((2, 5, 9, 12)).to(torch.float32).leaves
    if strange:
        filters = [f.mT.contiguous().mT if f.dim() == 4 and f.shape[2] == f.shape[3] else f for f in filters]
    else:
        filters = [torch.empty_like(f, memory_format=torch.channels_last).copy_(f) if f.dim() == 4 else f for f in filters]
        assert any(f.stride() != torch.empty(f.shape).stride() for f in filters)
    backward = operator(f"{sample_of.__name__.removesuffix('_sample')}_backward", backend) if backend != "reference" else None
    sample = replace(sample_of((2, 5, 9, 12)).to(torch.float32), leaves=(x, *filters))
    check(sample, backend, grad_like(x))
    if backward is not None:
        arguments = (grad_like(x), x, *([filters] if sample.operator == "msca_strips" else filters), True, True)
        grads = tree_leaves(backward(*arguments))[1:]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            faked = tree_leaves(backward(*tree_map_only(torch.Tensor, mode.from_tensor, arguments)))[1:]
        kept = [f.stride() if f.is_contiguous() else torch.empty(f.shape).stride() for f in filters]
        assert [grad.stride() for grad in grads] == [grad.stride() for grad in faked] == kept


def test_channel_slice_of_one_image(sample_of, backend):
    """With a batch of one such a slice is dense, though its batch stride is that of the larger image."""
    sample = sample_of((1, 17, 9, 11)).to(torch.float32)
    sample = sample.with_x(torch.full((1, 40, 9, 11), torch.nan)[:, 5:22].copy_(sample.x))
    check(sample, backend, grad_like(sample.x))


@image_layouts
@pytest.mark.parametrize("grad_layout", [*IMAGE_LAYOUTS, "sliced", "expanded"])
@compiled
def test_grad_out_layouts(sample_of, grad_layout, layout, backend):
    sample = arranged(sample_of((3, 17, 13, 9)).to(torch.float32), layout)
    checks.check_grad_out_layouts(sample, backend, grad_layout)
    checks.check_expanded_grad_out(sample, backend)


@compiled
def test_no_double_backward(sample_of, backend):
    checks.check_no_double_backward(sample_of((1, 3, 4, 5)).to(torch.float32), backend)


def test_compile(sample_of, backend):
    checks.check_compile([sample_of(shape).to(torch.float32) for shape in COMPILE_SHAPES], backend, "aot_eager")


@compiled
def test_compile_inductor(sample_of, backend):
    samples = [arranged(sample_of(shape).to(torch.float32), "channels_last") for shape in COMPILE_SHAPES]
    checks.check_compile(samples, backend, "inductor")


@image_layouts
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_autocast(sample_of, batch, dtype, layout, backend):
    checks.check_autocast(arranged(sample_of((batch, 17, 9, 11)).to(torch.float32), layout), backend, dtype)


@image_layouts
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 5, 37), (2, 3, 0, 5), (1, 64, 12, 24)], ids=str)
def test_float32_filters_beside_16_bits(sample_of, shape, dtype, layout, backend):
    """They are not rounded, nor are their gradients."""
    sample = arranged(sample_of(shape).to(torch.float32), layout)
    sample = sample.with_x(sample.x.to(dtype))
    check(sample, backend, grad_like(sample.x))
    if sample.x.numel() > 0:
        checks.check_fake(sample, backend)
    if backend == "cpu":
        checks.check_poison(sample, backend)


MIXED = {  # the dtypes of x, of the first of the filters, and of the last
    "the last in 16 bits": (torch.bfloat16, torch.float32, torch.bfloat16),
    "the last in float32": (torch.bfloat16, torch.bfloat16, torch.float32),
    "float32 beside float64": (torch.float64, torch.float32, torch.float32),
    "float64 beside 16 bits": (torch.float16, torch.float64, torch.float64),
    "other 16 bits": (torch.bfloat16, torch.float16, torch.float16),
}


@compiled
@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_operators_without_checks_in_python_refuse_mixed_filters(sample_of, mix, backend):
    """Which would read beyond the end of a filter."""
    x, first, *more = sample_of((1, 3, 4, 5)).leaves
    x, filters = x.to(mix[0]), [first.to(mix[1]), *(leaf.to(mix[1]) for leaf in more[:-1]), more[-1].to(mix[2])]
    operator = sample_of.__name__.removesuffix("_sample")
    arguments = [filters] if operator == "msca_strips" else filters
    operators = torch.ops.segnext_kernels
    with pytest.raises(RuntimeError, match="must be .* of the dtype that goes with x's"):
        getattr(operators, operator)(x, *arguments)
    with pytest.raises(RuntimeError, match="must be .* of the dtype that goes with x's"):
        getattr(operators, f"{operator}_backward")(x, x, *arguments, True, True)


@image_layouts
@compiled
def test_operators_take_other_layouts(sample_of, layout, backend):
    """As a traced graph may bring them: what was channels_last when it was traced need not be when it runs."""
    checks.check_other_layouts(arranged(sample_of((2, 70, 9, 13)).to(torch.float32), layout), backend, layout)


@compiled
def test_operators_without_checks_in_python_refuse_other_shapes(sample_of, backend):
    """Though they have as many elements."""
    x, *filters = sample_of((1, 3, 4, 5)).leaves
    name = sample_of.__name__.removesuffix("_sample")
    for i in range(len(filters)):
        spoiled = [*filters[:i], filters[i].mT[None], *filters[i + 1 :]] if filters[i].dim() > 1 else None
        spoiled = spoiled or [*filters[:i], filters[i][:, None], *filters[i + 1 :]]
        with pytest.raises(RuntimeError, match="must be .* of the dtype that goes with x's"):
            operator(name, backend)(x, *([spoiled] if name == "msca_strips" else spoiled))


@image_layouts
@dtypes
@pytest.mark.parametrize("shape", [(3, 33, 45, 41), (1, 3, 120, 130), (1, 130, 19, 17)], ids=str)
@compiled
def test_threads(sample_of, shape, dtype, layout, backend, set_threads):
    checks.check_threads(arranged(sample_of(shape).to(dtype), layout), set_threads)


@image_layouts
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 17, 5, 37), (1, 33, 33, 13), (1, 3, 1, 40), (1, 5, 23, 1)], ids=str)
@compiled
def test_nothing_is_read_outside(sample_of, shape, dtype, layout, backend):
    checks.check_poison(arranged(sample_of(shape).to(dtype), layout), backend)


def test_no_gradient_needed(sample_of, backend):
    checks.check_nothing_needed(sample_of((2, 17, 13, 9)).to(torch.float32), backend)


@image_layouts
@compiled
def test_keeps_only_its_arguments(sample_of, layout, backend):
    checks.check_saved_tensors(arranged(sample_of((2, 17, 13, 9)).to(torch.float32), layout), backend)


@image_layouts
@pytest.mark.parametrize("shape", [(2, 17, 5, 9), (2, 1, 4, 3), (1, 3, 1, 7)], ids=str)
def test_fake_tensors(sample_of, shape, layout, backend):
    checks.check_fake(arranged(sample_of(shape).to(torch.float32), layout), backend)


def test_meta(sample_of):
    checks.check_meta(sample_of((2, 3, 4, 5)).to(torch.bfloat16))


def test_autocast_casts_no_whole_numbers(sample_of, backend):
    sample = sample_of((1, 3, 4, 5)).to(torch.float32)
    x, first, *rest = sample.leaves
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="must have x's dtype"):
        replace(sample, leaves=(x, first.long(), *rest))(backend)


@image_layouts
def test_a_batch_of_gradients(sample_of, layout, one_thread):
    """``is_grads_batched``, as vectorised Jacobians ask for."""
    sample = arranged(sample_of((2, 5, 4, 6)).to(torch.float32), layout)
    leaves = [leaf.detach().requires_grad_() for leaf in sample.leaves]
    y = replace(sample, leaves=tuple(leaves))()
    grads = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, leaves, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        for one, expected in zip(found, torch.autograd.grad(y, leaves, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(one[i], expected)


@pytest.mark.parametrize("layout", ["sliced", "expanded", "transposed"])
@compiled
def test_a_recorded_call_takes_any_strides(sample_of, layout, backend):
    """Programs that were traced or exported call the operators themselves, forward and backward."""
    sample = arranged(sample_of((2, 5, 6, 7)).to(torch.float32), layout)
    answers = []
    for x in (sample.x, sample.x.contiguous()):
        leaves = [leaf.detach().requires_grad_() for leaf in (x, *sample.leaves[1:])]
        rest = (leaves[1:],) if sample.operator == "msca_strips" else leaves[1:]
        y = getattr(torch.ops.segnext_kernels, sample.operator)(leaves[0], *rest)
        answers.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert_same(answers[0], answers[1])


@compiled
def test_lazy_clones_stay(sample_of, backend):
    """What is only read is not asked for as if it were written, which would copy it."""
    sample = sample_of((2, 5, 6, 7)).to(torch.float32)
    clones = tuple(torch._lazy_clone(leaf) for leaf in sample.leaves)
    assert_same([replace(sample, leaves=clones)(backend)], [sample(backend)])
    assert all(map(torch._C._is_cow_tensor, clones))
