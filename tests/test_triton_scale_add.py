"""The Triton kernels of scale_add, as Triton's interpreter runs them on the CPU; test_scale_add.py has the other backends."""

from __future__ import annotations

from dataclasses import replace

import checks
import pytest
import torch
from operators import (
    HALVES,
    IMAGE_LAYOUTS,
    Sample,
    arrange,
    assert_same,
    check,
    error,
    gpu_dtypes,
    grad_like,
    image_layouts,
    interpreted,
    results,
    scale_add_sample,
    tolerance,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from segnext_kernels import _select, scale_add

kernels = pytest.importorskip("segnext_kernels.scale_add.triton", reason="Triton is not installed")
pytestmark = interpreted

# One pixel, odd, more channels and more pixels than a tile has, tiles of all channels and of some, empty
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 40), (2, 17, 5, 37), (1, 33, 33, 13), (2, 300, 3, 5), (1, 2, 1, 2100), (3, 64, 9, 11)]
SHAPES += [(1, 160, 4, 5), (2, 1, 21, 11), (0, 3, 5, 5), (2, 3, 0, 5), (2, 0, 5, 5)]


def sample_of(shape: tuple[int, ...], dtype: torch.dtype, layout: str, dropped: bool = True) -> Sample:
    """x and y both in the layout."""
    sample = scale_add_sample(shape, dropped).to(dtype)
    x, y, scale = sample.leaves
    return replace(sample, leaves=(arrange(x, layout), arrange(y, layout), scale))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropped", [False, True])
@image_layouts
@gpu_dtypes
def test_values_and_gradients(dtype, layout, dropped, shape, backend):
    sample = sample_of(shape, dtype, layout, dropped)
    check(sample, backend, grad_like(sample.x))


@image_layouts
@pytest.mark.parametrize("programs", [1, 3, 1 << 20])
def test_parts(programs, layout, monkeypatch, backend):
    """Programs that go over all tiles of an image, over some, the last of them over fewer, and over one."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    monkeypatch.setattr(kernels, "LANES", 64)
    sample = sample_of((1, 17, 13, 19), torch.float32, layout)
    check(sample, backend, grad_like(sample.x))


@pytest.mark.parametrize("kinds", [("float32", "bfloat16", "float32"), ("bfloat16", "float16", "bfloat16")], ids=str)
@image_layouts
def test_dtypes_that_differ(kinds, layout, backend):
    exact = scale_add_sample((2, 17, 9, 11))
    leaves = tuple(leaf.to(getattr(torch, kind)) for leaf, kind in zip(exact.leaves, kinds, strict=True))
    sample = Sample("scale_add", (arrange(leaves[0], layout), arrange(leaves[1], layout), leaves[2]), exact.options)
    grad_out = grad_like(sample.x.float())
    y, *grads = results(sample, backend, grad_out)
    assert y.dtype == torch.float32 and [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    for got, right in zip([y, *grads], sample.exact(grad_out), strict=True):
        assert error(got, right) <= tolerance(got.dtype)


@image_layouts
def test_layouts_that_differ(layout, backend):
    x, y, scale = scale_add_sample((3, 17, 6, 23)).to(torch.float32).leaves
    for other in (*IMAGE_LAYOUTS, "sliced", "expanded"):
        sample = Sample("scale_add", (arrange(x, layout), arrange(y, other), scale))
        check(sample, backend, grad_like(x))
        checks.check_grad_out_layouts(sample_of((3, 17, 6, 23), torch.float32, layout), backend, other)


def test_factors_with_gaps_between_them(backend):
    x, y, scale = (sample := scale_add_sample((3, 17, 6, 23)).to(torch.float32)).leaves
    keep = arrange(sample.options["keep"].float(), "sliced")
    check(Sample("scale_add", (x, y, arrange(scale, "sliced")), {"keep": keep}), backend, grad_like(x))


@image_layouts
def test_operator_takes_other_layouts(layout, backend):
    """As a traced graph may bring them."""
    x, y, scale = scale_add_sample((2, 17, 5, 9)).to(torch.float32).leaves
    x, other = arrange(x, layout), arrange(y, next(name for name in IMAGE_LAYOUTS if name != layout))
    operators = torch.ops.segnext_kernels_triton
    assert error(operators.scale_add(x, other, scale, None), x + scale[:, None, None] * y) <= 1e-6
    grad_y, _ = operators.scale_add_backward(x, other, scale, None, True, True)
    assert grad_y.stride() == other.stride() and error(grad_y, x * scale[:, None, None]) <= 1e-6


@image_layouts
@gpu_dtypes
def test_what_every_operator_must_do(dtype, layout, backend):
    sample = sample_of((2, 17, 13, 9), dtype, layout, dropped=False)
    checks.check_layout(sample, backend)
    checks.check_nothing_needed(sample, backend)
    checks.check_saved_tensors(sample, backend)
    checks.check_fake(sample, backend)
    checks.check_poison(sample, backend)
    for needed in ({0}, {1}, {2}, {0, 1}, {1, 2}):
        checks.check_needed_gradients(sample, backend, needed)
    want = results(sample, backend, grad_like(sample.x))
    assert_same(results(sample, backend, grad_like(sample.x)), want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_promotes_as_pytorch_does(dtype, backend):
    x, y, scale = scale_add_sample((2, 17, 9, 11)).to(torch.float32).leaves
    with torch.autocast("cpu", dtype=dtype):
        assert scale_add(x, y.to(dtype), scale, backend=backend).dtype == torch.float32
        assert scale_add(x.to(dtype), y.to(dtype), scale.to(dtype), backend=backend).dtype == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_value_stays_alone(bad, backend):
    x, y, scale = scale_add_sample((2, 17, 9, 7)).to(torch.float32).leaves
    wrong = y.clone()
    wrong[0, 3, 4, 5] = bad
    got, clean = (results(Sample("scale_add", (x, value, scale)), backend) for value in (wrong, y))
    assert (got[0] != clean[0]).sum() == 1 and not got[0][0, 3, 4, 5].isfinite()
    assert_same(got[1:3], clean[1:3])
    assert not got[3][3].isfinite() and torch.equal(got[3][torch.arange(17) != 3], clean[3][torch.arange(17) != 3])


def test_opcheck(backend):
    x, y, scale = (leaf.requires_grad_() for leaf in sample_of((2, 5, 3, 4), torch.float32, "channels_last").leaves)
    arguments = (torch.ones_like(x).detach(), y.detach(), scale.detach(), None, True, True)
    checks.check_registration("scale_add", (x, y, scale, None), arguments, backend=backend)


def test_torch_compile_fuses_it_with_its_neighbours(monkeypatch, backend):
    """On a GPU a compiled graph has plain PyTorch, unless it is told otherwise."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(1, 2, 3, 4)
        assert _select.select("scale_add", None, x) == "reference"
        assert _select.select("dwconv_gelu", None, x) != "reference"
    assert _select.select("scale_add", backend, torch.empty(1, 2, 3, 4)) == backend
