"""msca_strips against its float64 reference and the golden values."""

from __future__ import annotations

import re
from dataclasses import replace

import checks
import pytest
import torch
import torch.nn.functional as F
from operators import (
    arrange,
    arranged,
    assert_same,
    check,
    compiled,
    dtypes,
    error,
    golden,
    grad_like,
    image_layouts,
    results,
    sample_inputs,
)
from operators import msca_strips_sample as sample_of

from segnext_kernels import explain, msca_strips
from segnext_kernels.nn import AttentionModule

REACH = 2 + 10  # of the 5x5 filter, then of the 21 taps


@image_layouts
@dtypes
@pytest.mark.parametrize("sample", sample_inputs("msca_strips"))
def test_values_and_gradients(sample, dtype, layout, backend):
    sample = arranged(sample.to(dtype), layout)
    check(sample, backend, grad_like(sample.x))


def test_strided_weights(backend):
    sample = sample_of((2, 6, 9, 8)).to(torch.float32)
    weights = [arrange(w, "sliced") if i % 2 else w.repeat_interleave(2, 0)[::2] for i, w in enumerate(sample.leaves[1:])]
    weights[1] = weights[1][:1].expand(6)
    check(replace(sample, leaves=(sample.x, *weights)), backend, grad_like(sample.x))


@pytest.mark.parametrize("case", ["odd", "wide", "tall"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
@image_layouts
def test_golden(case, dtype, limit, layout, backend):
    values = {key: value.to(dtype) for key, value in golden(f"msca/{case}/").items()}
    module = AttentionModule(values["x"].shape[1]).to(dtype)
    parameters = dict(module.named_parameters())
    module.load_state_dict({name: values[f"param/{name}"] for name in parameters})
    x = arrange(values["x"], layout).requires_grad_()
    y = module.conv3(msca_strips(x, module.strip_weights(), backend=backend)) * x
    y.backward(values["grad_out"])
    assert error(y.detach(), values["y"]) <= limit
    assert error(x.grad, values["grad_x"]) <= limit
    assert {name: e for name in parameters if (e := error(parameters[name].grad, values[f"grad/{name}"])) > limit} == {}


def test_gradcheck(backend):
    sample = sample_of((2, 2, 3, 4))
    leaves = [leaf.requires_grad_() for leaf in sample.leaves]
    assert torch.autograd.gradcheck(lambda x, *weights: msca_strips(x, weights, backend=backend), leaves)


def test_double_backward_of_the_reference():
    leaves = [leaf.requires_grad_() for leaf in sample_of((1, 2, 3, 3), branch_sizes=(3,)).leaves]
    assert torch.autograd.gradgradcheck(lambda x, *weights: msca_strips(x, weights, backend="reference"), leaves)


@image_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 5, 9), (2, 3, 1, 1), (0, 3, 5, 5)], ids=str)
@compiled
def test_opcheck(shape, dtype, layout, backend):
    x, *weights = arranged(sample_of(shape).to(dtype), layout).leaves
    forward = (x.detach().requires_grad_(), [w.detach().requires_grad_() for w in weights])
    backward = ((torch.ones_like(x), x, weights, *need) for need in ((True, True), (True, False), (False, True)))
    checks.check_registration("msca_strips", forward, *backward)


@image_layouts
@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@compiled
def test_non_finite_pixel_stays_within_reach(bad, dtype, layout, backend):
    sample = arranged(sample_of((2, 17, 40, 37)).to(dtype), layout)
    grad_out = grad_like(sample.x)
    image, channel, row, column = 1, 3, 17, 20
    near = torch.zeros(sample.x.shape, dtype=torch.bool)
    near[image, channel, row - REACH : row + REACH + 1, column - REACH : column + REACH + 1] = True
    clean = results(sample, backend, grad_out)
    x, grad = sample.x.clone(), grad_out.clone()
    x[image, channel, row, column] = grad[image, channel, row, column] = bad
    forward, backward = results(sample.with_x(x), backend, grad_out), results(sample, backend, grad)
    for got, want in ((forward[0], clean[0]), (backward[1], clean[1])):
        assert torch.equal(got[~near], want[~near])
        assert not got[image, channel, row, column].isfinite()
    others = torch.arange(17) != channel
    assert_same([forward[1], *(g[others] for g in forward[2:])], [clean[1], *(g[others] for g in clean[2:])])


@pytest.mark.parametrize("needed", [{0}, set(range(1, 15)), {1}, {2}, {5}, {14}, {0, 3}], ids=lambda s: "-".join(map(str, s)))
@image_layouts
def test_only_needed_gradients(needed, layout, backend):
    checks.check_needed_gradients(arranged(sample_of((2, 17, 13, 9)).to(torch.float32), layout), backend, needed)


@pytest.mark.parametrize("sizes", [(3, 5), (7,), (), (1, 21, 9, 3)], ids=str)
def test_other_branch_sizes(sizes):
    sample = sample_of((2, 3, 11, 12), sizes).to(torch.float32)
    check(sample, None, grad_like(sample.x))
    assert explain("msca_strips", sample.x, branch_sizes=sizes)["reference"] == "serves"


@compiled
def test_other_branch_sizes_have_no_compiled_kernels(backend):
    sample = sample_of((1, 3, 4, 4), (3, 5))
    assert "(3, 5)" in explain("msca_strips", sample.x, branch_sizes=(3, 5))["cpu"]
    with pytest.raises(ValueError, match=r"msca_strips: backend 'cpu' cannot serve this call: .*\(7, 11, 21\).*\(3, 5\)"):
        sample(backend)


def replaced(index: int, value: object) -> list:
    x, *weights = sample_of((2, 4, 9, 8)).to(torch.float32).leaves
    weights[index] = value
    return [x, weights]


def with_x(x: object) -> list:
    return [x, replaced(0, torch.zeros(4, 1, 5, 5))[1]]


BAD = {
    "rank 3": (with_x(torch.zeros(4, 9, 8)), ValueError, "x must be [N, C, H, W], got shape [4, 9, 8]"),
    "integers": (
        with_x(torch.zeros(2, 4, 9, 8, dtype=torch.int64)),
        TypeError,
        "x must be float32, float64, bfloat16 or float16",
    ),
    "complex": (with_x(torch.zeros(2, 4, 9, 8, dtype=torch.complex64)), TypeError, "got torch.complex64"),
    "no tensor": (with_x([[1.0]]), TypeError, "x must be a tensor, got list"),
    "weight no tensor": (replaced(3, None), TypeError, "weights[3] must be a tensor, got NoneType"),
    "weights no list": ([torch.zeros(2, 4, 9, 8), torch.zeros(3)], TypeError, "weights must be a list or tuple of tensors"),
    "too few weights": ([torch.zeros(2, 4, 9, 8), replaced(0, torch.zeros(4, 1, 5, 5))[1][:-1]], ValueError, "got 13"),
    "no weights": ([torch.zeros(2, 4, 9, 8), []], ValueError, "got 0"),
    "other channel count": (
        replaced(0, torch.zeros(5, 1, 5, 5)),
        ValueError,
        "weights[0] must be [4, 1, 5, 5], got [5, 1, 5, 5]",
    ),
    "dense filter": (replaced(0, torch.zeros(4, 4, 5, 5)), ValueError, "weights[0] must be [4, 1, 5, 5], got [4, 4, 5, 5]"),
    "bias of 5": (replaced(5, torch.zeros(5)), ValueError, "weights[5] must be [4], got [5]"),
    "even filter": (
        replaced(2, torch.zeros(4, 1, 1, 6)),
        ValueError,
        "weights[2] must be a row filter [4, 1, 1, k] with odd k",
    ),
    "flat row filter": (replaced(6, torch.zeros(4, 11)), ValueError, "weights[6] must be a row filter"),
    "column for row": (replaced(2, torch.zeros(4, 1, 7, 1)), ValueError, "weights[2] must be [4, 1, 1, 1], got [4, 1, 7, 1]"),
    "unequal branch": (replaced(4, torch.zeros(4, 1, 9, 1)), ValueError, "weights[4] must be [4, 1, 7, 1], got [4, 1, 9, 1]"),
    "dtype mix": (
        replaced(9, torch.zeros(4).double()),
        TypeError,
        "weights[9] must have x's dtype torch.float32, got torch.float64",
    ),
    "mix of filters": (
        [
            torch.zeros(2, 4, 9, 8).bfloat16(),
            [w.bfloat16() if i != 9 else w for i, w in enumerate(replaced(9, torch.zeros(4))[1])],
        ],
        TypeError,
        "weights[9] must have x's dtype torch.bfloat16 (or with all others float32), got torch.float32",
    ),
    "device mix": (replaced(9, torch.zeros(4, device="meta")), ValueError, "weights[9] must be on x's device cpu, got meta"),
}


@pytest.mark.parametrize(("arguments", "exception", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, exception, message):
    with pytest.raises(exception, match=r"^msca_strips: .*" + re.escape(message)):
        msca_strips(*arguments)


@pytest.mark.parametrize("name", ["cuda", "metal"])
def test_backend_that_cannot_serve(name):
    with pytest.raises(ValueError, match=f"^msca_strips: backend '{name}' cannot serve this call: "):
        sample_of((1, 3, 4, 4))(name)


def test_mixed_float64_under_autocast(backend):
    """Autocast leaves float64 alone, so that it cannot mend this mix."""
    sample = sample_of((1, 3, 4, 4)).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"weights\[0\] must have x's dtype"):
        sample.with_x(sample.x.double())(backend)


def test_plain_convolutions(backend):
    """The equation, written once more with single filters: what the reference itself is compared with."""
    x, w5, b5, wh, bh, wv, bv = sample_of((2, 3, 8, 30), (21,)).leaves
    a = torch.stack([F.conv2d(x[:, c : c + 1], w5[c : c + 1], b5[c : c + 1], padding=2)[:, 0] for c in range(3)], 1)
    padded = F.pad(a, (10, 10))
    rows = sum(wh[:, 0, 0, t].view(3, 1, 1) * padded[..., t : t + 30] for t in range(21)) + bh.view(3, 1, 1)
    padded = F.pad(rows, (0, 0, 10, 10))
    y = a + sum(wv[:, 0, t].view(3, 1, 1) * padded[..., t : t + 8, :] for t in range(21)) + bv.view(3, 1, 1)
    assert error(msca_strips(x, [w5, b5, wh, bh, wv, bv], backend="reference"), y) < 1e-14
