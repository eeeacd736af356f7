"""scale_add against its float64 reference, and bit for bit against plain PyTorch."""

from __future__ import annotations

import itertools
import re

import checks
import pytest
import torch
from operators import (
    IMAGE_LAYOUTS,
    Sample,
    arrange,
    arranged,
    assert_same,
    check,
    compiled,
    dtypes,
    error,
    grad_like,
    image_layouts,
    results,
    sample_inputs,
    tolerance,
)
from operators import scale_add_sample as sample_of

from segnext_kernels import scale_add

# of x, y and scale, and of the result: autocast brings the first, the others are the rest of what may meet
MIXED = [
    (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float16, torch.float16, torch.float32),
    (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float32, torch.float16, torch.float32),
]


def both_layouts(sample: Sample, x_layout: str, y_layout: str) -> Sample:
    x, y, scale = sample.leaves
    return Sample("scale_add", (arrange(x, x_layout), arrange(y, y_layout), scale), sample.options)


def plain(x, y, scale, keep=None):
    scaled = scale[:, None, None] * y
    return x + (scaled if keep is None else scaled * keep[:, None, None, None])


@image_layouts
@dtypes
@pytest.mark.parametrize("sample", sample_inputs("scale_add"))
def test_values_and_gradients(sample, dtype, layout, backend):
    sample = both_layouts(sample.to(dtype), layout, layout)
    check(sample, backend, grad_like(sample.x))


@dtypes
@pytest.mark.parametrize("layouts", list(itertools.permutations([*IMAGE_LAYOUTS, "sliced", "expanded"], 2)), ids=str)
def test_layouts_that_differ(layouts, dtype, backend):
    sample = both_layouts(sample_of((3, 17, 6, 23)).to(dtype), *layouts)
    check(sample, backend, grad_like(sample.x))


@pytest.mark.parametrize("shape", [(3, 33, 45, 41), (2, 64, 5, 8)], ids=str)
@image_layouts
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bits_of_plain_pytorch(dtype, dropped, layout, shape):
    """The result and the gradients of x and y; sums over pixels are free in their order."""
    sample = both_layouts(sample_of(shape, dropped).to(dtype), layout, layout)
    leaves = [leaf.requires_grad_() for leaf in sample.leaves]
    keep = {name: value.to(dtype) for name, value in sample.options.items()}
    y, want = (function(*leaves, **keep) for function in (scale_add, plain))
    assert_same([y], [want])
    assert_same(*(torch.autograd.grad(out, leaves[:2], grad_like(y)) for out in (y, want)))


@pytest.mark.parametrize("kinds", MIXED, ids=str)
@image_layouts
def test_dtypes_that_differ(kinds, layout, backend):
    *kinds, expected = kinds
    exact = sample_of((2, 17, 9, 11))
    leaves = tuple(leaf.to(kind) for leaf, kind in zip(exact.leaves, kinds, strict=True))
    sample = both_layouts(Sample("scale_add", leaves, exact.options), layout, layout)
    y, *grads = results(sample, backend, grad_like(sample.x.to(expected)))
    want = sample.exact(grad_like(sample.x.to(expected)))
    assert y.dtype == expected == plain(*sample.leaves).dtype
    assert [grad.dtype for grad in grads] == kinds
    for got, right in zip([y, *grads], want, strict=True):
        assert error(got, right) <= tolerance(got.dtype)


@image_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_promotes_as_pytorch_does(dtype, layout, backend):
    x, y, scale = sample_of((2, 17, 9, 11)).to(torch.float32).leaves
    x, y = arrange(x, layout), arrange(y, layout)
    with torch.autocast("cpu", dtype=dtype):
        assert scale_add(x, y.to(dtype), scale, backend=backend).dtype == torch.float32
        assert scale_add(x.to(dtype), y.to(dtype), scale, backend=backend).dtype == torch.float32
        assert scale_add(x.to(dtype), y.to(dtype), scale.to(dtype), backend=backend).dtype == dtype


@image_layouts
@pytest.mark.parametrize("shape", [(2, 17, 5, 9), (2, 3, 1, 1), (2, 1, 4, 3), (1, 3, 1, 7)], ids=str)
def test_layout_is_kept(shape, layout, backend):
    sample = both_layouts(sample_of(shape, False).to(torch.float32), layout, layout)
    checks.check_fake(sample, backend)
    assert sample(backend).stride() == sample.x.stride()


def test_factors_with_gaps_between_them(backend):
    x, y, scale = (sample := sample_of((3, 17, 6, 23)).to(torch.float32)).leaves
    keep = arrange(sample.options["keep"].float(), "sliced")
    check(Sample("scale_add", (x, y, arrange(scale, "sliced")), {"keep": keep}), backend, grad_like(x))


@pytest.mark.parametrize("dropped", [False, True])
def test_gradcheck(dropped, backend):
    sample = sample_of((2, 3, 4, 5), dropped)
    leaves = [leaf.requires_grad_() for leaf in sample.leaves]
    assert torch.autograd.gradcheck(lambda *args: scale_add(*args, **sample.options, backend=backend), leaves)


def test_double_backward_of_the_reference():
    leaves = [leaf.requires_grad_() for leaf in sample_of((1, 2, 3, 3)).leaves]
    assert torch.autograd.gradgradcheck(lambda *args: scale_add(*args, backend="reference"), leaves)


@compiled
def test_no_double_backward(backend):
    x, y, scale = (leaf.float().requires_grad_() for leaf in sample_of((1, 3, 4, 5)).leaves)
    (grad,) = torch.autograd.grad(scale_add(x, y, scale, backend=backend).square().sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="scale_add has no second derivative.*backend='reference'"):
        grad.square().sum().backward()


@image_layouts
@pytest.mark.parametrize("shape", [(2, 17, 5, 9), (2, 3, 1, 1), (0, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
@compiled
def test_opcheck(y_dtype, shape, layout, backend):
    sample = both_layouts(sample_of(shape).to(torch.float32), layout, layout)
    x, y, scale, keep = (*sample.leaves, sample.options["keep"].float())
    forward = (x.requires_grad_(), y.to(y_dtype).requires_grad_(), scale.requires_grad_())
    y, scale = (leaf.detach() for leaf in forward[1:])
    for mask in (None, keep):
        arguments = torch.ones_like(x).detach(), y, scale, mask
        backward = ((*arguments, *need) for need in ((True, True), (True, False), (False, True)))
        checks.check_registration("scale_add", (*forward, mask), *backward)


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
def test_a_gradient_has_the_strides_of_its_scale(backend):
    """Those of a dimension of length 1 are free, and DistributedDataParallel wants them as the parameter has them."""
    x, scale = torch.rand(2, 1, 5, 9), torch.rand(5)[::5].requires_grad_()
    (grad,) = torch.autograd.grad(scale_add(x, x, scale, backend=backend).sum(), scale)
    assert grad.stride() == scale.stride() == (5,)


@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {0, 1}, {1, 2}], ids=lambda s: "-".join(map(str, s)))
@image_layouts
def test_only_needed_gradients(needed, layout, backend):
    checks.check_needed_gradients(arranged(sample_of((2, 17, 13, 9)).to(torch.float32), layout), backend, needed)


@image_layouts
@dtypes
@pytest.mark.parametrize("shape", [(3, 33, 45, 41), (1, 3, 120, 130), (1, 130, 19, 17)], ids=str)
@compiled
def test_threads(shape, dtype, layout, backend, set_threads):
    checks.check_threads(arranged(sample_of(shape).to(dtype), layout), set_threads)


@image_layouts
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 17, 5, 37), (1, 33, 33, 13)], ids=str)
@compiled
def test_nothing_is_read_outside(shape, dtype, layout, backend):
    checks.check_poison(both_layouts(sample_of(shape).to(dtype), layout, layout), backend)


@image_layouts
@compiled
def test_grad_out_layouts(layout, backend):
    sample = both_layouts(sample_of((3, 17, 13, 9)).to(torch.float32), layout, layout)
    for grad_layout in (*IMAGE_LAYOUTS, "sliced", "expanded"):
        checks.check_grad_out_layouts(sample, backend, grad_layout)
    checks.check_expanded_grad_out(sample, backend)


@image_layouts
@compiled
def test_operator_takes_other_layouts(layout, backend):
    """As a traced graph may bring them: what was channels_last when it was traced need not be when it runs."""
    x, y, scale = sample_of((2, 17, 5, 9)).to(torch.float32).leaves
    other = next(name for name in IMAGE_LAYOUTS if name != layout)
    operators, want = torch.ops.segnext_kernels, arrange(x, layout)
    assert_same([operators.scale_add(want, arrange(y, other), scale, None)], [plain(x, y, scale)])
    grads = operators.scale_add_backward(want, arrange(y, other), scale, None, True, True)
    assert grads[0].stride() == arrange(y, other).stride()
    assert_same([grads[0]], [x * scale[:, None, None]])


@image_layouts
@compiled
def test_keeps_only_its_arguments(layout, backend):
    checks.check_saved_tensors(both_layouts(sample_of((2, 17, 13, 9), False).to(torch.float32), layout, layout), backend)


def test_no_gradient_needed(backend):
    checks.check_nothing_needed(sample_of((2, 17, 13, 9)).to(torch.float32), backend)


def test_meta():
    sample = sample_of((2, 3, 4, 5), False).to(torch.bfloat16)
    checks.check_meta(sample)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@compiled
def test_compile(compiler, backend):
    shapes = [(2, 5, 9, 12), (3, 5, 8, 31), (4, 5, 40, 7)]
    samples = [both_layouts(sample_of(shape, False).to(torch.float32), "channels_last", "channels_last") for shape in shapes]
    checks.check_compile(samples, backend, compiler)


@image_layouts
@compiled
def test_long_sums_of_one_sign(layout, backend):
    """Each addend is cut off to the sum's last place, always to the same side."""
    y = arrange(torch.ones(2, 3, 400, 500), layout)
    scale = torch.ones(3, requires_grad=True)
    scale_add(torch.zeros_like(y), y, scale, backend=backend).backward(torch.full_like(y, 0.1))
    assert (scale.grad / (400_000 * torch.tensor(0.1).double()) - 1).abs().max() < 8e-6


@compiled
def test_compiled_once_it_takes_other_strides(backend):
    """Of the same sizes: Dynamo then has strides that are no numbers."""
    x, scale = torch.randn(2, 6, 7, 9), torch.randn(6)
    function = torch.compile(lambda x, y: scale_add(x, y, scale, backend=backend), backend="eager")
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16(), x):
        assert_same(function(given, 2 * x), scale_add(given, 2 * x, scale, backend=backend))


@image_layouts
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@compiled
def test_non_finite_value_stays_alone(bad, layout, backend):
    sample = both_layouts(sample_of((2, 17, 9, 7)).to(torch.float32), layout, layout)
    x, y, scale = sample.leaves
    y = y.clone()
    y[0, 3, 4, 5] = bad
    got, clean = (results(Sample("scale_add", (x, value, scale), sample.options), backend) for value in (y, sample.leaves[1]))
    near = torch.zeros_like(x, dtype=torch.bool)
    near[0, 3, 4, 5] = True
    assert not got[0][near].isfinite().any() and torch.equal(got[0][~near], clean[0][~near])
    assert_same(got[1:3], clean[1:3])
    assert not got[3][3].isfinite() and torch.equal(got[3][torch.arange(17) != 3], clean[3][torch.arange(17) != 3])


GOOD = dict(zip(("x", "y", "scale"), sample_of((2, 4, 9, 8)).to(torch.float32).leaves, strict=True))
BAD = {
    "rank 3": ({"x": torch.zeros(4, 9, 8)}, ValueError, "x must be [N, C, H, W], got shape [4, 9, 8]"),
    "integers": ({"y": torch.zeros(2, 4, 9, 8, dtype=torch.int32)}, TypeError, "y must have a floating dtype"),
    "float64 mix": ({"scale": torch.zeros(4).double()}, TypeError, "goes with x's torch.float32, got torch.float64"),
    "no tensor": ({"y": None}, TypeError, "y must be a tensor, got NoneType"),
    "other size": ({"y": torch.zeros(2, 4, 9, 1)}, ValueError, "y must be [2, 4, 9, 8], got [2, 4, 9, 1]"),
    "scale of 5": ({"scale": torch.zeros(5)}, ValueError, "scale must be [4], got [5]"),
    "keep of 4": ({"keep": torch.zeros(4)}, ValueError, "keep must be [2], got [4]"),
    "keep by hand": ({"keep": [1, 0]}, TypeError, "keep must be a tensor, got list"),
    "keep with gradient": ({"keep": torch.ones(2, requires_grad=True)}, ValueError, "keep gets no gradient"),
    "device mix": ({"scale": torch.zeros(4, device="meta")}, ValueError, "scale must be on x's device cpu, got meta"),
    "not on this machine": ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot serve this call"),
}


@pytest.mark.parametrize(("change", "exception", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, exception, message):
    with pytest.raises(exception, match=r"^scale_add: .*" + re.escape(message)):
        scale_add(**GOOD | change)


@compiled
def test_operators_refuse_what_is_not_safe(backend):
    x, y, scale = GOOD.values()
    operators = torch.ops.segnext_kernels
    for arguments in ((x, y[:1], scale, None), (x, y, scale[:2], None), (x, y.double(), scale, None), (x, y, scale, scale)):
        with pytest.raises(RuntimeError, match="segnext_kernels"):
            operators.scale_add(*arguments)
    with pytest.raises(RuntimeError, match="segnext_kernels"):
        operators.scale_add_backward(x[:1], y, scale, None, True, True)
