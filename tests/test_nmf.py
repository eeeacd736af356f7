"""nmf against its float64 reference, the golden values, and everything that an operator must do."""

from __future__ import annotations

import re
from dataclasses import replace

import checks
import pytest
import torch
from operators import (
    GRADIENTS,
    HALVES,
    MATRIX_LAYOUTS,
    Sample,
    arrange,
    arranged,
    assert_same,
    check,
    compiled,
    dtypes,
    error,
    golden,
    grad_like,
    matrix_layouts,
    results,
    sample_inputs,
    tolerance,
)
from operators import nmf_sample as sample_of
from torch.func import jacfwd, jacrev

from segnext_kernels import build_info, nmf

gradients = pytest.mark.parametrize("gradient", GRADIENTS)


@matrix_layouts
@dtypes
@pytest.mark.parametrize("sample", sample_inputs("nmf"))
def test_values_and_gradients(sample, dtype, layout, backend):
    sample = arranged(sample.to(dtype), layout)
    check(sample, backend, grad_like(sample.x))


@gradients
@dtypes
@pytest.mark.parametrize("layout", ["sliced", "expanded"])
def test_strides_that_are_copied(layout, dtype, gradient, backend):
    sample = arranged(sample_of(3, 17, 46, 5, 2, gradient).to(dtype), layout)
    check(sample, backend, grad_like(sample.x))


@pytest.mark.parametrize("layout", ["sliced", "expanded", "transposed"])
def test_strided_bases(layout, backend):
    x, bases = sample_of(3, 17, 46, 5, 2).to(torch.float32).leaves
    check(Sample("nmf", (x, arrange(bases, layout)), {"steps": 2}), backend, grad_like(x))


@gradients
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bases_in_half_precision(dtype, gradient, backend):
    """They are taken as they are; the factors that come of them stay in float32."""
    x, bases = sample_of(2, 45, 300, 16, 6, gradient).to(dtype).leaves
    check(Sample("nmf", (x, bases.to(dtype)), {"steps": 6, "gradient": gradient}), backend, grad_like(x))


@pytest.mark.parametrize("shape", [(2, 1, 37, 3), (2, 17, 1, 3), (2, 33, 45, 3), (1, 1, 1, 1), (1, 5, 9, 16)], ids=str)
@matrix_layouts
def test_layout_is_kept(shape, layout, backend):
    checks.check_layout(arranged(sample_of(*shape, 2).to(torch.float32), layout), backend)


def test_slice_of_one_matrix(backend):
    """With a batch of one such a slice is dense, though its batch stride is that of the larger tensor."""
    sample = sample_of(1, 17, 45, 3, 6).to(torch.float32)
    sample = sample.with_x(torch.full((1, 40, 45), torch.nan)[:, 5:22].copy_(sample.x))
    check(sample, backend, grad_like(sample.x))


@matrix_layouts
@pytest.mark.parametrize("grad_layout", [*MATRIX_LAYOUTS, "sliced", "expanded"])
@compiled
def test_grad_out_layouts(grad_layout, layout, backend):
    sample = arranged(sample_of(3, 17, 46, 5, 6).to(torch.float32), layout)
    checks.check_grad_out_layouts(sample, backend, grad_layout)
    checks.check_expanded_grad_out(sample, backend)


@pytest.mark.parametrize("case", ["r3", "r16", "r64"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
@gradients
@matrix_layouts
def test_golden(case, dtype, limit, gradient, layout, backend):
    values = golden(f"nmf/{case}/")
    x, bases = arrange(values["x"].to(dtype), layout), values["bases0"].to(dtype)
    sample = Sample("nmf", (x, bases), {"steps": int(values["steps"]), "gradient": gradient})
    y, grad_x, _ = results(sample, backend, values["grad_out"].to(dtype))
    assert error(y, values["y"]) <= limit
    assert error(grad_x, values[f"grad_x_{gradient}"]) <= limit


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_gradcheck(steps, backend):
    leaves = [leaf.add(0.1).requires_grad_() for leaf in sample_of(2, 4, 5, 3, steps).leaves]  # away from the corner at zero
    assert torch.autograd.gradcheck(lambda x, bases: nmf(x, bases, steps, backend=backend), leaves)


def test_double_backward_of_the_reference():
    leaves = [leaf.add(0.1).requires_grad_() for leaf in sample_of(1, 3, 4, 2, 2).leaves]
    assert torch.autograd.gradgradcheck(lambda x, bases: nmf(x, bases, 2, backend="reference"), leaves)


@gradients
@compiled
def test_no_double_backward(gradient, backend):
    checks.check_no_double_backward(sample_of(1, 5, 9, 3, 2, gradient).to(torch.float32), backend)


@gradients
@matrix_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 9, 3, 2), (1, 33, 17, 16, 0), (0, 5, 9, 3, 2), (2, 5, 0, 3, 2)], ids=str)
@compiled
def test_opcheck(shape, dtype, layout, gradient, backend):
    x, bases = arranged(sample_of(*shape).to(dtype), layout).leaves
    how = shape[-1], gradient
    forward = (x.detach().requires_grad_(), bases.detach().requires_grad_(), *how)
    torch.library.opcheck(torch.ops.segnext_kernels.nmf_and_factors.default, forward)
    _, factors = torch.ops.segnext_kernels.nmf_and_factors(x, bases, *how)
    needs = (factors, True, True), (None, True, False), (factors, False, True)
    backward = ((torch.ones_like(x), x, bases, kept, *how, *need) for kept, *need in needs)
    checks.check_registration("nmf", forward, *backward)


@gradients
@matrix_layouts
@compiled
def test_kept_factors(layout, gradient, backend):
    """Backward with what forward kept is backward without it, and leaves it as it is; nothing is kept in vain."""
    x, bases = arranged(sample_of(2, 33, 300, 17, 3).to(torch.float32), layout).leaves
    y, factors = torch.ops.segnext_kernels.nmf_and_factors(x, bases, 3, gradient)
    steps = 3 if gradient == "exact" else 0
    assert factors.numel() == 2 * ((2 * steps + 3) * 300 + (2 * steps + 1) * 33) * 32
    assert_same([y], [nmf(x, bases, 3, gradient, backend=backend)])
    before = factors.clone()
    for kept in (factors, factors):
        arguments = (3, gradient, True, True)
        got = torch.ops.segnext_kernels.nmf_backward(torch.ones_like(x), x, bases, kept, *arguments)
        assert_same(got, torch.ops.segnext_kernels.nmf_backward(torch.ones_like(x), x, bases, None, *arguments))
    assert_same([factors], [before])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        nmf(x.requires_grad_(), bases, 3, gradient, backend=backend)
        assert saved == [x.numel(), bases.numel(), factors.numel()]
        with torch.no_grad():
            nmf(x, bases, 3, gradient, backend=backend)
        nmf(x.detach(), bases, 3, gradient, backend=backend)
    assert len(saved) == 3


COMPILE_SHAPES = [(2, 9, 12, 3), (3, 9, 31, 3), (4, 7, 40, 5), (2, 9, 12, 3)]


@gradients
def test_compile(gradient, backend):
    samples = [sample_of(*shape, 2, gradient).to(torch.float32) for shape in COMPILE_SHAPES]
    checks.check_compile(samples, backend, "aot_eager")


@compiled
def test_compile_inductor(backend):
    samples = [arranged(sample_of(*shape, 2).to(torch.float32), "transposed") for shape in COMPILE_SHAPES]
    checks.check_compile(samples, backend, "inductor")


@matrix_layouts
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 45, 3), (0, 17, 45, 3)], ids=str)
def test_autocast(shape, dtype, layout, backend):
    """x is rounded, the factors are not: the float64 answer for the rounded x is met to the precision of storing y."""
    sample = arranged(sample_of(*shape, 6).to(torch.float32), layout)
    checks.check_autocast(sample, backend, dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = sample(backend)
    assert error(y, sample.to(dtype).exact()[0]) <= tolerance(dtype)


@gradients
@matrix_layouts
@dtypes
@pytest.mark.parametrize("shape", [(2, 96, 515, 16), (1, 130, 257, 64), (5, 45, 70, 17)], ids=str)
@compiled
def test_threads(shape, dtype, layout, gradient, backend, set_threads):
    checks.check_threads(arranged(sample_of(*shape, 2, gradient).to(dtype), layout), set_threads)


@gradients
@matrix_layouts
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 45, 3), (1, 33, 13, 17), (1, 70, 130, 100), (3, 1, 37, 16)], ids=str)
@compiled
def test_nothing_is_read_outside(shape, dtype, layout, gradient, backend):
    checks.check_poison(arranged(sample_of(*shape, 2, gradient).to(dtype), layout), backend)


@matrix_layouts
@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_matrix_leaves_the_rest_alone(bad, dtype, layout, backend):
    sample = arranged(sample_of(3, 17, 45, 16, 6).to(dtype), layout)
    clean = results(sample, backend)
    x = sample.x.clone()
    x[1, 3, 20] = bad
    got = results(sample.with_x(x), backend)
    assert not got[0][1].isfinite().any()
    assert_same([g[[0, 2]] for g in got], [g[[0, 2]] for g in clean])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_entry_without_steps(bad, backend):
    """Only its column enters, through the coefficients' one update."""
    sample = sample_of(1, 17, 45, 16, 0).to(torch.float32)
    clean, x = sample(backend), sample.x.clone()
    x[0, 3, 20] = bad
    got, others = sample.with_x(x)(backend), torch.arange(45) != 20
    assert not got[0, :, 20].isfinite().any()
    assert torch.equal(got[..., others], clean[..., others])


@gradients
def test_zeros(gradient, backend):
    """A matrix of zeros has the approximation zero, and finite gradients, though every quotient is nearly 0 / 0."""
    sample = sample_of(2, 17, 45, 5, 6, gradient).to(torch.float32)
    sample = sample.with_x(sample.x * torch.tensor([0.0, 1.0]).view(2, 1, 1))
    y, *grads = results(sample, backend, grad_like(sample.x))
    assert not y[0].any()
    assert all(grad.isfinite().all() for grad in grads)
    for got, want in zip([y, *grads], sample.exact(grad_like(sample.x)), strict=True):
        assert error(got[1], want[1]) <= 2e-5


@matrix_layouts
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1, 256, 1024, 16, 7), (1, 96, 2080, 64, 7), (2, 33, 47, 5, 7)], ids=str)
@compiled
def test_factors_are_not_rounded(shape, dtype, layout, backend):
    """Every element of y is off by its own rounding and by what a product of float32 leaves, however many steps there were."""
    sample = arranged(sample_of(*shape).to(dtype), layout)
    got, want = sample(backend).double(), sample.exact()[0]
    rounding = want.abs() * torch.finfo(dtype).eps / 2
    assert ((got - want).abs() - rounding).max() <= 2e-5 * want.abs().max()


ROUNDED = [(1, 256, 1024, 64, 7), (2, 96, 2080, 50, 6), (2, 64, 32, 32, 0), (1, 64, 96, 17, 2), (1, 33, 300, 64, 3)]


@matrix_layouts
@pytest.mark.parametrize("scale", [1, 10, 100])
@pytest.mark.parametrize("shape", ROUNDED, ids=str)
def test_rounded_factors(shape, scale, layout, backend):
    """An element of y is off by four roundings: its own, those of the factors that make it, and one for the updates."""
    sample = sample_of(*shape)
    sample = arranged(sample.with_x(sample.x * scale).to(torch.bfloat16), layout)
    got, want = nmf(*sample.leaves, shape[-1], round_factors=True, backend=backend).double(), sample.exact()[0]
    rounding = want.abs() * torch.finfo(torch.bfloat16).eps / 2
    assert ((got - want).abs() - 4 * rounding).max() <= 2e-5 * want.abs().max()


@matrix_layouts
@dtypes
def test_factors_are_rounded_for_bfloat16_without_gradient_only(dtype, layout, backend):
    sample = arranged(sample_of(2, 96, 64, 64, 3).to(dtype), layout)
    x, bases = sample.leaves
    y = nmf(x, bases, 3, round_factors=True, backend=backend)
    rounds = backend == "cpu" and build_info()["isa"] in ("avx512_bf16", "amx_bf16") and layout == "transposed"
    assert torch.equal(y, sample(backend)) != (rounds and dtype == torch.bfloat16)
    for wanted in ((x.detach().requires_grad_(), bases), (x, bases.detach().requires_grad_())):
        y = nmf(*wanted, 3, round_factors=True, backend=backend)
        assert_same([y.detach()], results(sample, backend)[:1])


@compiled
def test_rounded_factors_of_a_non_finite_matrix(backend):
    x, bases = arranged(sample_of(3, 64, 96, 33, 3).to(torch.bfloat16), "transposed").leaves
    x[1, 5, 7] = torch.nan
    y = nmf(x, bases, 3, round_factors=True, backend=backend)
    assert not y[1].isfinite().any() and y[::2].isfinite().all()
    assert not nmf(torch.zeros_like(x), bases, 3, round_factors=True, backend=backend).any()


@matrix_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_values(dtype, layout, backend):
    """Logits of thousands do not overflow the softmax; float32 rounds them by as many times 2^-24, about 1e-4."""
    sample = sample_of(2, 17, 45, 5, 6)
    sample = arranged(sample.with_x(sample.x * 1000).to(dtype), layout)
    assert error(sample(backend), sample.exact()[0]) <= tolerance(dtype) + 1e-4


@gradients
@pytest.mark.parametrize("needed", [{0}, {1}], ids=["x", "bases"])
@matrix_layouts
@compiled
def test_only_needed_gradients(needed, layout, gradient, backend):
    checks.check_needed_gradients(arranged(sample_of(2, 17, 45, 5, 6, gradient).to(torch.float32), layout), backend, needed)


@pytest.mark.parametrize("steps", [0, 6])
def test_one_step_gradient_of_bases_is_zero(steps, backend):
    assert not results(sample_of(2, 17, 45, 5, steps, "one_step").to(torch.float32), backend)[2].any()
    bases = torch.rand(1, 4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(nmf(torch.rand(1, 4, 5), bases, steps, "one_step", backend=backend).sum(), bases)
    assert not gradient.any()


@gradients
def test_no_gradient_needed(gradient, backend):
    checks.check_nothing_needed(sample_of(2, 17, 45, 5, 6, gradient).to(torch.float32), backend)


@matrix_layouts
@pytest.mark.parametrize("shape", [(2, 17, 45, 5), (2, 1, 4, 3), (1, 3, 1, 7)], ids=str)
def test_fake_tensors(shape, layout, backend):
    checks.check_fake(arranged(sample_of(*shape, 2).to(torch.float32), layout), backend)


def test_meta():
    checks.check_meta(sample_of(2, 3, 4, 5, 2).to(torch.bfloat16))


GOOD = {"x": torch.ones(2, 5, 9), "bases": torch.ones(2, 5, 3), "steps": 2}
BAD = {
    "rank 4": ({"x": torch.ones(2, 5, 3, 3)}, ValueError, "x must be [B, D, N], got shape [2, 5, 3, 3]"),
    "bases of rank 2": ({"bases": torch.ones(5, 3)}, ValueError, "bases must be [B, D, R], got shape [5, 3]"),
    "integers": ({"x": torch.ones(2, 5, 9, dtype=torch.int64)}, TypeError, "x must be float32, float64, bfloat16 or float16"),
    "boolean bases": ({"bases": torch.ones(2, 5, 3, dtype=torch.bool)}, TypeError, "bases must be float32, float64"),
    "no tensor": ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
    "no bases": ({"bases": None}, TypeError, "bases must be a tensor, got NoneType"),
    "other batch": ({"bases": torch.ones(1, 5, 3)}, ValueError, "[2, 5, >= 1] for x [2, 5, 9], got [1, 5, 3]"),
    "other rows": ({"bases": torch.ones(2, 6, 3)}, ValueError, "[2, 5, >= 1] for x [2, 5, 9], got [2, 6, 3]"),
    "no columns": ({"bases": torch.ones(2, 5, 0)}, ValueError, "[2, 5, >= 1] for x [2, 5, 9], got [2, 5, 0]"),
    "dtype mix": ({"bases": torch.ones(2, 5, 3).double()}, TypeError, "for x of torch.float32, got torch.float64"),
    "device mix": ({"bases": torch.ones(2, 5, 3, device="meta")}, ValueError, "bases must be on x's device cpu, got meta"),
    "negative steps": ({"steps": -1}, ValueError, "steps must be between 0 and 1048576, got -1"),
    "endless steps": ({"steps": 2**63 - 1}, ValueError, "steps must be between 0 and 1048576, got 9"),
    "float steps": ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
    "bool steps": ({"steps": True}, TypeError, "steps must be an int, got bool"),
    "rounded by what": ({"round_factors": "bfloat16"}, TypeError, "round_factors must be a bool, got str"),
    "unknown gradient": ({"gradient": "last"}, ValueError, "gradient must be one of exact, one_step, got 'last'"),
    "no such backend": ({"backend": "metal"}, ValueError, "backend 'metal' cannot serve this call: there is no backend"),
    "not on this machine": ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot serve this call"),
}


@pytest.mark.parametrize(("change", "exception", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, exception, message):
    with pytest.raises(exception, match=r"^nmf: .*" + re.escape(message)):
        nmf(**GOOD | change)


@compiled
def test_unknown_gradient_for_the_operator_itself(backend):
    x, bases = sample_of(2, 5, 9, 3, 2).leaves
    with pytest.raises(RuntimeError, match="gradient.*last"):
        torch.ops.segnext_kernels.nmf(x, bases, 2, "last")
    with pytest.raises(RuntimeError, match="gradient.*last"):
        torch.ops.segnext_kernels.nmf_backward(x, x, bases, None, 2, "last", True, True)


@gradients
def test_batch_does_not_matter(gradient, backend):
    """Every matrix of a batch is decomposed as if it were alone."""
    sample = sample_of(3, 17, 45, 5, 6, gradient).to(torch.float32)
    together = results(sample, backend)
    for i in range(3):
        alone = results(replace(sample, leaves=tuple(leaf[i : i + 1] for leaf in sample.leaves)), backend)
        assert all(error(a, t[i : i + 1]) <= (0 if backend == "cpu" else 1e-5) for a, t in zip(alone, together, strict=True))


@compiled
def test_factors_that_no_memory_holds(backend):
    """2^61 numbers, of which no size may become a small one."""
    x, bases = torch.ones(1, 1, 1 << 20), torch.ones(1, 1, 1 << 20, requires_grad=True)
    with pytest.raises(MemoryError):
        nmf(x, bases, 1 << 20, backend=backend)


@pytest.mark.parametrize("gradient", ["exact", "one_step"])
def test_forward_mode_is_the_same_derivative(gradient):
    x, bases = torch.rand(1, 4, 5, dtype=torch.float64), torch.rand(1, 4, 2, dtype=torch.float64)
    for argument in (0, 1):
        jacobians = [of(lambda x, bases: nmf(x, bases, 3, gradient), argument)(x, bases) for of in (jacfwd, jacrev)]
        torch.testing.assert_close(*jacobians)
