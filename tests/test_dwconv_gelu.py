"""dwconv_gelu against its float64 reference and the exact GELU."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import checks
import pytest
import torch
from operators import (
    Sample,
    arrange,
    arranged,
    assert_same,
    check,
    compiled,
    dtypes,
    grad_like,
    image_layouts,
    results,
    sample_inputs,
)
from operators import dwconv_gelu_sample as sample_of

from segnext_kernels import dwconv_gelu


@image_layouts
@dtypes
@pytest.mark.parametrize("sample", sample_inputs("dwconv_gelu"))
def test_values_and_gradients(sample, dtype, layout, backend):
    sample = arranged(sample.to(dtype), layout)
    check(sample, backend, grad_like(sample.x))


def test_strided_weights(backend):
    x, weight, bias = sample_of((2, 6, 9, 8)).to(torch.float32).leaves
    check(Sample("dwconv_gelu", (x, weight.repeat_interleave(2, 0)[::2], bias[:1].expand(6))), backend, grad_like(x))
    check(Sample("dwconv_gelu", (x, weight.mT.contiguous().mT, arrange(bias, "sliced"))), backend, grad_like(x))


@image_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gelu_all_along_the_line(dtype, layout, backend):
    """Through a filter that is 1 in the middle: no approximation of erf shows, neither in the tails nor around zero."""
    z = torch.cat([torch.linspace(-40, 40, 16001), torch.logspace(-30, 4, 500), -torch.logspace(-30, 4, 500)]).to(dtype)
    x = arrange(torch.zeros(1, 2, 1, z.numel(), dtype=dtype), layout).copy_(z).requires_grad_()
    weight, bias = torch.zeros(2, 1, 3, 3, dtype=dtype), torch.zeros(2, dtype=dtype)
    weight[:, 0, 1, 1] = 1
    y = dwconv_gelu(x, weight, bias, backend=backend)
    y.sum().backward()
    wide = z.double()
    distribution = torch.special.ndtr(wide)
    density = torch.exp(-wide.square() / 2) / math.sqrt(2 * math.pi)
    for got, want in ((y.detach(), wide * distribution), (x.grad, distribution + wide * density)):
        errors = (got[0].double() - want).abs() / wide.abs().clamp_min(1).squeeze()
        assert errors.max() <= 4 * torch.finfo(dtype).eps


def test_gradcheck(backend):
    leaves = [leaf.requires_grad_() for leaf in sample_of((2, 3, 4, 5)).leaves]
    assert torch.autograd.gradcheck(lambda *args: dwconv_gelu(*args, backend=backend), leaves)


def test_double_backward_of_the_reference():
    leaves = [leaf.requires_grad_() for leaf in sample_of((1, 2, 3, 3)).leaves]
    assert torch.autograd.gradgradcheck(lambda *args: dwconv_gelu(*args, backend="reference"), leaves)


@image_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 5, 9), (2, 3, 1, 1), (0, 3, 5, 5)], ids=str)
@compiled
def test_opcheck(shape, dtype, layout, backend):
    leaves = arranged(sample_of(shape).to(dtype), layout).leaves
    arguments = (torch.ones_like(leaves[0]), *leaves)
    forward = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    backward = ((*arguments, *need) for need in ((True, True), (True, False), (False, True)))
    checks.check_registration("dwconv_gelu", forward, *backward)


@image_layouts
@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@compiled
def test_non_finite_pixel_stays_within_reach(bad, dtype, layout, backend):
    sample = sample_of((2, 17, 9, 37)).to(dtype)
    sample = arranged(replace(sample, leaves=(sample.x, sample.leaves[1].abs(), sample.leaves[2])), layout)
    grad_out = grad_like(sample.x)
    image, channel, row, column = 1, 3, 4, 20
    near = torch.zeros(sample.x.shape, dtype=torch.bool)
    near[image, channel, row - 1 : row + 2, column - 1 : column + 2] = True
    clean = results(sample, backend, grad_out)
    x, grad = sample.x.clone(), grad_out.clone()
    x[image, channel, row, column] = grad[image, channel, row, column] = bad
    forward, backward = results(sample.with_x(x), backend, grad_out), results(sample, backend, grad)
    for got, want in ((forward[0], clean[0]), (backward[1], clean[1])):
        assert torch.equal(got[~near], want[~near])
        assert not got[image, channel, row, column].isfinite()
    others = torch.arange(17) != channel
    for got in (forward, backward):
        assert_same([g[others] for g in got[2:]], [g[others] for g in clean[2:]])


@pytest.mark.parametrize("needed", [{0}, {1, 2}, {1}, {2}, {0, 2}], ids=lambda s: "-".join(map(str, s)))
@image_layouts
def test_only_needed_gradients(needed, layout, backend):
    checks.check_needed_gradients(arranged(sample_of((2, 17, 13, 9)).to(torch.float32), layout), backend, needed)


GOOD = dict(zip(("x", "weight", "bias"), sample_of((2, 4, 9, 8)).to(torch.float32).leaves, strict=True))
BAD = {
    "rank 3": ({"x": torch.zeros(4, 9, 8)}, ValueError, "x must be [N, C, H, W], got shape [4, 9, 8]"),
    "integers": (
        {"x": torch.zeros(2, 4, 9, 8, dtype=torch.int32)},
        TypeError,
        "x must be float32, float64, bfloat16 or float16",
    ),
    "no tensor": ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    "sparse": ({"x": torch.zeros(2, 4, 9, 8).to_sparse()}, TypeError, "x must be a dense tensor, got torch.sparse_coo"),
    "no bias": ({"bias": None}, TypeError, "bias must be a tensor, got NoneType"),
    "other channel count": ({"weight": torch.zeros(5, 1, 3, 3)}, ValueError, "weight must be [4, 1, 3, 3], got [5, 1, 3, 3]"),
    "even filter": ({"weight": torch.zeros(4, 1, 2, 2)}, ValueError, "weight must be [4, 1, 3, 3], got [4, 1, 2, 2]"),
    "dense filter": ({"weight": torch.zeros(4, 4, 3, 3)}, ValueError, "weight must be [4, 1, 3, 3], got [4, 4, 3, 3]"),
    "bias of 5": ({"bias": torch.zeros(5)}, ValueError, "bias must be [4], got [5]"),
    "dtype mix": (
        {"weight": torch.zeros(4, 1, 3, 3).half()},
        TypeError,
        "weight must have x's dtype torch.float32, got torch.float16",
    ),
    "mix of filters": (
        {"x": torch.zeros(2, 4, 9, 8).half(), "bias": torch.zeros(4).half()},
        TypeError,
        "weight must have x's dtype torch.float16 (or with all others float32), got torch.float32",
    ),
    "device mix": ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias must be on x's device cpu, got meta"),
    "no such backend": ({"backend": "metal"}, ValueError, "backend 'metal' cannot serve this call: there is no backend"),
    "not on this machine": ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot serve this call"),
}


@pytest.mark.parametrize(("change", "exception", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, exception, message):
    with pytest.raises(exception, match=r"^dwconv_gelu: .*" + re.escape(message)):
        dwconv_gelu(**GOOD | change)


@dtypes
def test_large_values(dtype, backend):
    """Far out GELU is the identity or zero, and its derivative one or zero: nothing overflows on the way."""
    x, weight, bias = sample_of((1, 3, 9, 8)).to(dtype).leaves
    sample = Sample("dwconv_gelu", (x * 2000, weight, bias))
    check(sample, backend, grad_like(x))


@compiled
@image_layouts
def test_gradients_of_filters_are_exact_in_large_images(layout, backend):
    """Sums of a million equal numbers, which one sum from pixel to pixel rounds the same way each time: to 1e-3 here."""
    x = arrange(torch.full((1, 1, 1024, 1024), 0.7), layout)
    weight, bias = (t.requires_grad_() for t in (torch.full((1, 1, 3, 3), 0.1), torch.zeros(1)))
    dwconv_gelu(x, weight, bias, backend=backend).backward(torch.full_like(x, 0.1))
    leaves = [t.detach().double().requires_grad_() for t in (weight, bias)]
    dwconv_gelu(x.double(), *leaves, backend="reference").backward(torch.full_like(x, 0.1).double())
    for ours, exact in zip((weight, bias), leaves, strict=True):
        assert ((ours.grad - exact.grad).abs() <= 5e-5 * exact.grad.abs()).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_gelu_of_very_negative_numbers_is_zero_from_below(backend, dtype):
    z = torch.tensor([-6.0, -7, -20, -1e3, -1e6, -1e10], dtype=dtype)
    identity = torch.zeros(1, 1, 3, 3, dtype=dtype)
    identity[0, 0, 1, 1] = 1
    x = z.view(1, 1, 1, -1).clone().requires_grad_()
    y = dwconv_gelu(x, identity, torch.zeros(1, dtype=dtype), backend=backend).flatten()
    assert (y <= 0).all() and (y >= -1e-7).all() and (y[3:] == 0).all()
    y.sum().backward()
    assert (x.grad.flatten()[3:] == 0).all() and x.grad.abs().max() < 1e-6


@compiled
def test_none_given_to_the_operator_itself(backend, capfd):
    """As programs that were exported can: the kernel's own check says what is wrong, and libtorch prints nothing."""
    with pytest.raises(RuntimeError, match=r"weight must be \[4, 1, 3, 3\]"):
        torch.ops.segnext_kernels.dwconv_gelu(GOOD["x"], None, GOOD["bias"])
    assert capfd.readouterr().err == ""
