"""nmf with a projection, which the CPU kernels multiply with the bases: what test_nmf.py asks of nmf alone."""

from __future__ import annotations

import checks
import pytest
import torch
from operators import (
    EMPTY_MATRICES,
    GRADIENTS,
    HALVES,
    MATRICES,
    MATRIX_LAYOUTS,
    Sample,
    arranged,
    assert_same,
    check,
    compiled,
    dtypes,
    error,
    grad_like,
    matrix_layouts,
    results,
)
from operators import nmf_sample as sample_of

import segnext_kernels
from segnext_kernels import nmf

gradients = pytest.mark.parametrize("gradient", GRADIENTS)


def projected(*shape, gradient="exact") -> Sample:
    return sample_of(*shape, gradient, projected=True)


@gradients
@matrix_layouts
@dtypes
@pytest.mark.parametrize("shape", MATRICES + EMPTY_MATRICES, ids=str)
@compiled
def test_values_and_gradients(shape, dtype, layout, gradient, backend):
    sample = arranged(projected(*shape, gradient=gradient).to(dtype), layout)
    check(sample, backend, grad_like(sample.x))


@gradients
@matrix_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend(dtype, layout, gradient, backend):
    """Triton's kernels are followed by a product with y, which is rounded once more."""
    sample = arranged(projected(2, 33, 45, 5, 3, gradient=gradient).to(dtype), layout)
    assert sample(backend).stride() == sample.x.stride()
    if backend == "triton" and dtype != torch.float32:
        assert error(sample(backend), sample.exact()[0]) <= 4 * torch.finfo(dtype).eps
    else:
        check(sample, backend, grad_like(sample.x))


@pytest.mark.parametrize("shape", [(2, 1, 37, 3), (2, 17, 1, 3), (2, 33, 45, 3), (1, 1, 1, 1)], ids=str)
@matrix_layouts
@compiled
def test_layout_is_kept(shape, layout, backend):
    checks.check_layout(arranged(projected(*shape, 2).to(torch.float32), layout), backend)


@matrix_layouts
@pytest.mark.parametrize("grad_layout", [*MATRIX_LAYOUTS, "sliced", "expanded"])
@compiled
def test_grad_out_layouts(grad_layout, layout, backend):
    checks.check_grad_out_layouts(arranged(projected(2, 33, 45, 3, 2).to(torch.float32), layout), backend, grad_layout)


@pytest.mark.parametrize("steps", [0, 2])
@compiled
def test_gradcheck(steps, backend):
    x, *rest = projected(2, 4, 6, 3, steps).leaves
    leaves = tuple(leaf.requires_grad_() for leaf in (x + 0.1, *rest))
    assert torch.autograd.gradcheck(lambda x, b, p: nmf(x, b, steps, projection=p, backend=backend), leaves)


@gradients
@compiled
def test_no_double_backward(gradient, backend):
    leaves = tuple(leaf.requires_grad_() for leaf in projected(2, 5, 9, 3, 2).leaves)
    y = nmf(*leaves[:2], 2, gradient, projection=leaves[2], backend=backend)
    (grad_x,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="^nmf has no second derivative.*backend='reference'"):
        grad_x.square().sum().backward()


@gradients
@matrix_layouts
@pytest.mark.parametrize("shape", [(2, 5, 9, 3, 2), (1, 33, 17, 16, 0), (0, 5, 9, 3, 2)], ids=str)
@compiled
def test_opcheck(shape, layout, gradient, backend):
    sample = arranged(projected(*shape, gradient=gradient).to(torch.float32), layout)
    steps = shape[-1]
    leaves = [leaf.detach().requires_grad_() for leaf in sample.leaves]
    y, factors = torch.ops.segnext_kernels.nmf_projected(*leaves, steps, gradient, True, False)
    backward = (torch.ones_like(y), *sample.leaves, factors.detach(), steps, gradient, True, True, True)
    checks.check_registration("nmf_projected", (*leaves, steps, gradient, True, False), backward)


@gradients
@compiled
def test_compile(gradient, backend):
    samples = [projected(2, 33, columns, 3, 2, gradient=gradient).to(torch.float32) for columns in (45, 46)]
    checks.check_compile(samples, backend, "aot_eager")


@matrix_layouts
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@compiled
def test_autocast(dtype, layout, backend):
    checks.check_autocast(arranged(projected(2, 17, 45, 3, 2).to(torch.float32), layout), backend, dtype)


@gradients
@matrix_layouts
@dtypes
@pytest.mark.parametrize("shape", [(2, 96, 515, 16), (1, 130, 257, 64), (5, 45, 70, 17)], ids=str)
@compiled
def test_threads(shape, dtype, layout, gradient, backend, set_threads):
    checks.check_threads(arranged(projected(*shape, 2, gradient=gradient).to(dtype), layout), set_threads)


@matrix_layouts
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 45, 3), (1, 33, 13, 17), (1, 70, 130, 100)], ids=str)
@compiled
def test_nothing_is_read_outside(shape, dtype, layout, backend):
    checks.check_poison(arranged(projected(*shape, 2).to(dtype), layout), backend)


@gradients
@pytest.mark.parametrize("needed", [{0}, {2}, {0, 2}, {0, 1}], ids=str)
@compiled
def test_only_needed_gradients(needed, gradient, backend):
    checks.check_needed_gradients(projected(2, 33, 45, 3, 2, gradient=gradient).to(torch.float32), backend, needed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@compiled
def test_no_gradient_needed(dtype, backend):
    """Nothing is kept then, and y has the same bits."""
    sample = projected(2, 32, 64, 17, 3).to(dtype)
    checks.check_nothing_needed(sample, backend)
    assert_same([sample(backend)], results(sample, backend)[:1])
    assert torch.ops.segnext_kernels.nmf_projected(*sample.leaves, 3, "exact", False, False)[1].numel() == 0


@matrix_layouts
@compiled
def test_fake_tensors(layout, backend):
    checks.check_fake(arranged(projected(2, 17, 45, 5, 2).to(torch.float32), layout), backend)


def test_meta():
    checks.check_meta(projected(2, 5, 9, 3, 2))


def test_transforms_go_through_plain_pytorch():
    x, bases, projection = projected(3, 5, 9, 3, 2).leaves
    y = torch.func.vmap(lambda one: nmf(one[None], bases[:1], 2, projection=projection)[0])(x)
    for i in range(3):
        assert error(y[i : i + 1], nmf(x[i : i + 1], bases[:1], 2, projection=projection)) <= 1e-12


@pytest.mark.parametrize(
    ("projection", "exception", "message"),
    [
        (torch.ones(5, 4), ValueError, r"projection must be \[5, 5\], got \[5, 4\]"),
        (torch.ones(5, 5).double(), TypeError, "projection must be a float32 tensor, got torch.float64"),
        (3, TypeError, "projection must be a float32 tensor, got int"),
        (torch.ones(5, 5, device="meta"), ValueError, "projection must be on x's device cpu, got meta"),
    ],
    ids=["shape", "dtype", "no tensor", "device"],
)
def test_bad_projections(projection, exception, message):
    with pytest.raises(exception, match=f"nmf: {message}"):
        nmf(torch.ones(2, 5, 9), torch.ones(2, 5, 3), 2, projection=projection)


@compiled
def test_the_operator_itself_checks_its_memory(backend):
    x, bases, projection = projected(2, 5, 9, 3, 2).to(torch.float32).leaves
    operators = torch.ops.segnext_kernels
    _, factors = operators.nmf_projected(x, bases, projection, 2, "exact", True, False)
    with pytest.raises(RuntimeError, match=r"projection must be contiguous \[5, 5\] on the CPU in float32"):
        operators.nmf_projected(x, bases, projection[:, :4], 2, "exact", True, False)
    with pytest.raises(RuntimeError, match=r"factors must be contiguous \[\d+\] on the CPU in float32"):
        operators.nmf_projected_backward(x, x, bases, projection, factors[1:], 2, "exact", True, True, True)


@matrix_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@compiled
def test_rounded_factors(dtype, layout, backend):
    """As without a projection: they change something where the processor multiplies bfloat16, and only without gradient."""
    x, bases, projection = arranged(projected(1, 64, 128, 32, 7).to(dtype), layout).leaves
    exact = nmf(x, bases, 7, projection=projection, backend=backend)
    rounded = nmf(x, bases, 7, projection=projection, round_factors=True, backend=backend)
    alone = [nmf(x, bases, 7, round_factors=rounds, backend=backend) for rounds in (False, True)]
    assert torch.equal(rounded, exact) == torch.equal(*alone)
    assert error(rounded, exact) <= 2e-2
    wanted = projection.detach().requires_grad_()
    kept = [nmf(x, bases, 7, projection=wanted, round_factors=rounds, backend=backend) for rounds in (False, True)]
    assert torch.equal(*kept)


def test_explained_as_nmf():
    assert "nmf_projected" not in segnext_kernels.explain("nmf", torch.ones(1, 2, 3))


@compiled
def test_a_program_exported_without_gradient_has_one(backend):
    """It keeps no factors, so backward computes them again."""
    sample = projected(2, 33, 45, 5, 2).to(torch.float32)
    x, bases, projection = sample.leaves

    class Program(torch.nn.Module):
        def forward(self, x):
            return nmf(x, bases.detach(), 2, projection=projection.detach())

    with torch.no_grad():
        program = torch.export.export(Program(), (x,)).module()
    answers = []
    for function in (program, Program()):
        leaf = x.detach().clone().requires_grad_()
        answers.append(torch.autograd.grad(function(leaf).square().sum(), leaf))
    assert_same(answers[0], answers[1])
