"""The Triton kernels of nmf, as Triton's interpreter runs them on the CPU."""

from __future__ import annotations

import itertools
from importlib import import_module
from types import ModuleType

import checks
import pytest
import torch
from operators import (
    EMPTY_MATRICES,
    GPU_DTYPES,
    GRADIENTS,
    HALVES,
    MATRIX_LAYOUTS,
    Sample,
    arrange,
    arranged,
    assert_same,
    check,
    error,
    golden,
    gpu_dtypes,
    grad_like,
    interpreted,
    matrix_layouts,
    nmf_sample,
    results,
    tolerance,
)

from segnext_kernels import _select, nmf

pytestmark = interpreted
gradients = pytest.mark.parametrize("gradient", GRADIENTS)

# [B, D, N, R] and steps: one element, odd, R above D and N, more than a chunk of rows, more than a tile of columns, no steps
MATRICES = [(1, 1, 1, 1, 2), (2, 5, 45, 3, 1), (2, 33, 5, 17, 1), (1, 70, 40, 16, 2), (2, 45, 64, 17, 0), (1, 20, 33, 128, 1)]
MATRICES += [(2, 18, 9, 65, 2)]  # a rank above 64, whose masks are at work
CASES = [(shape, "float32", layout, gradient) for shape in MATRICES for layout in MATRIX_LAYOUTS for gradient in GRADIENTS]
CASES += [(shape, dtype, "transposed", "exact") for shape in MATRICES for dtype in ("bfloat16", "float16")]
CASES += [(MATRICES[1], dtype, layout, "one_step") for dtype in ("bfloat16", "float16") for layout in MATRIX_LAYOUTS]
CASES += [(shape, "float32", "contiguous", gradient) for shape in EMPTY_MATRICES for gradient in GRADIENTS]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that cuts matrices, with so few columns for a program that also small ones are cut into many parts."""
    module = import_module("segnext_kernels.nmf._steps")
    monkeypatch.setattr(module, "PART", 32)
    return module


@pytest.mark.parametrize(("shape", "dtype", "layout", "gradient"), CASES, ids=str)
def test_values_and_gradients(shape, dtype, layout, gradient, backend):
    sample = arranged(nmf_sample(*shape, gradient).to(getattr(torch, dtype)), layout)
    check(sample, backend, grad_like(sample.x))


@gradients
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", [True, False])
def test_parts_and_tiles(held, dtype, gradient, kernels, monkeypatch, backend):
    """Several programs for a matrix, and sums that are held in registers, or not."""
    if not held:
        monkeypatch.setattr(kernels, "HELD", 0)
    if dtype == torch.float32:
        monkeypatch.setattr(kernels, "_precision", lambda x: "ieee")  # AMD's
    sample = nmf_sample(1, 40, 70, 16, 2, gradient).to(dtype)
    assert kernels.Problem.of(*sample.leaves).held == held
    check(sample, backend, grad_like(sample.x))


@pytest.mark.parametrize("layout", ["sliced", "expanded"])
def test_strides_that_are_copied(layout, backend):
    sample = arranged(nmf_sample(2, 17, 46, 5, 1).to(torch.float32), layout)
    check(sample, backend, grad_like(sample.x))


def test_slice_of_one_matrix(backend):
    """With a batch of one such a slice is dense, though its batch stride is that of the larger tensor."""
    sample = nmf_sample(1, 17, 45, 3, 1).to(torch.float32)
    sample = sample.with_x(torch.full((1, 40, 45), torch.nan)[:, 5:22].copy_(sample.x))
    check(sample, backend, grad_like(sample.x))


@pytest.mark.parametrize(("case", "gradient"), [("r3", "exact"), ("r16", "exact"), ("r16", "one_step"), ("r64", "exact")])
def test_golden(case, gradient, backend):
    values = golden(f"nmf/{case}/")
    x, bases = values["x"].float(), values["bases0"].float()
    sample = Sample("nmf", (x, bases), {"steps": int(values["steps"]), "gradient": gradient})
    y, grad_x, _ = results(sample, backend, values["grad_out"].float())
    assert error(y, values["y"]) <= 1e-5
    assert error(grad_x, values[f"grad_x_{gradient}"]) <= 1e-5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_factors_are_not_rounded(dtype, backend):
    """Every element of y is off by its own rounding and by what a product of float32 leaves, however many steps there were."""
    sample = nmf_sample(1, 64, 96, 16, 7).to(dtype)
    got, want = sample(backend).double(), sample.exact()[0]
    rounding = want.abs() * torch.finfo(dtype).eps / 2
    assert ((got - want).abs() - rounding).max() <= 2e-5 * want.abs().max()


@matrix_layouts
@gpu_dtypes
def test_nothing_is_read_outside(dtype, layout, backend):
    checks.check_poison(arranged(nmf_sample(1, 33, 45, 17, 1).to(dtype), layout), backend)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_matrix_leaves_the_rest_alone(bad, backend):
    sample = nmf_sample(3, 17, 45, 16, 2).to(torch.float32)
    clean, x = results(sample, backend), sample.x.clone()
    x[1, 3, 20] = bad
    got = results(sample.with_x(x), backend)
    assert not got[0][1].isfinite().any()
    assert_same([g[[0, 2]] for g in got], [g[[0, 2]] for g in clean])


@gradients
def test_zeros(gradient, backend):
    """A matrix of zeros has the approximation zero, and finite gradients, though every quotient is nearly 0 / 0."""
    sample = nmf_sample(2, 17, 45, 5, 2, gradient).to(torch.float32)
    sample = sample.with_x(sample.x * torch.tensor([0.0, 1.0]).view(2, 1, 1))
    y, *grads = results(sample, backend, grad_like(sample.x))
    assert not y[0].any()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_large_values(dtype, backend):
    """Logits of thousands do not overflow the softmax; float32 rounds them by as many times 2^-24, about 1e-4."""
    sample = nmf_sample(1, 17, 45, 5, 2)
    sample = sample.with_x(sample.x * 1000).to(dtype)
    assert error(sample(backend), sample.exact()[0]) <= tolerance(dtype) + 1e-4


def test_what_every_operator_must_do(kernels, backend):
    sample = arranged(nmf_sample(2, 17, 40, 5, 1).to(torch.float32), "transposed")
    checks.check_layout(sample, backend)
    checks.check_nothing_needed(sample, backend)
    checks.check_saved_tensors(sample, backend)
    checks.check_fake(sample, backend)
    checks.check_no_double_backward(sample, backend)
    for needed in ({0}, {1}):
        checks.check_needed_gradients(sample, backend, needed)
    checks.check_grad_out_layouts(sample, backend, "contiguous")
    want = results(sample, backend, grad_like(sample.x))
    assert_same(results(sample, backend, grad_like(sample.x)), want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, backend):
    checks.check_autocast(nmf_sample(2, 17, 45, 3, 1).to(torch.float32), backend, dtype)


def test_opcheck(backend):
    x, bases = arrange(nmf_sample(2, 5, 9, 3, 1).to(torch.float32).x, "transposed"), nmf_sample(2, 5, 9, 3, 1).leaves[1].float()
    forward = (x.detach().requires_grad_(), bases.detach().requires_grad_(), 1, "exact")
    checks.check_registration("nmf", forward, (torch.ones_like(x), x, bases, None, 1, "exact", True, False), backend=backend)


def test_tuning_runs_kernels_many_times(kernels, monkeypatch, backend):
    """What a kernel both reads and writes is restored between its runs."""

    def launch(kernel, grid, *args, configs, restore=(), **options):
        if len(configs) > 1:
            before = {name: args[kernel.arg_names.index(name)].clone() for name in restore}
            once(kernel, grid, *args, configs=configs[1:], **options)
            for name, value in before.items():
                args[kernel.arg_names.index(name)].copy_(value)
        once(kernel, grid, *args, configs=configs, **options)

    sample = nmf_sample(1, 17, 40, 5, 2).to(torch.float32)
    want, once = results(sample, backend), kernels.launch
    for name in ("_steps", "triton", "triton_backward"):
        monkeypatch.setattr(import_module(f"segnext_kernels.nmf.{name}"), "launch", launch)
    assert_same(results(sample, backend), want)


def test_matrices_beyond_32_bits_are_left_to_others(backend):
    large = torch.empty(1).expand(1, 1 << 16, 1 << 15)
    assert _select.why_not(backend, "nmf", large) == (
        "the Triton kernels of nmf are for matrices below 2**31 elements and 65536 rows, x is [1, 65536, 32768]"
    )


@pytest.mark.parametrize("steps", [0, 1])
def test_gradcheck(steps, backend):
    leaves = tuple(leaf.add(0.1) for leaf in nmf_sample(2, 4, 5, 3, steps).leaves)  # away from the corner at zero
    checks.check_gradients_of_float32(lambda x, bases: nmf(x, bases, steps, backend=backend), leaves)


def test_batch_does_not_matter(backend):
    """Every matrix of a batch is decomposed as if it were alone, up to the order of its sums."""
    sample = nmf_sample(3, 17, 45, 5, 2).to(torch.float32)
    together = sample(backend)
    for i in range(3):
        alone = Sample("nmf", tuple(leaf[i : i + 1] for leaf in sample.leaves), sample.options)(backend)
        assert error(alone, together[i : i + 1]) <= 1e-5


def test_what_is_left_to_others(backend):
    x = torch.ones(1, 4, 5)
    assert _select.why_not(backend, "nmf", x, rank=128) is None
    assert _select.why_not(backend, "nmf", x, rank=129) == "the Triton kernels have ranks up to 128, got 129"
    assert "float64" in _select.why_not(backend, "nmf", x.double())
    assert "conv_act" not in _select.why_not(backend, "conv_act", x)


@pytest.mark.parametrize("shape", [(1, 70, 150, 16, 0), (1, 70, 150, 33, 1)], ids=str)
def test_tiles_of_64_columns(shape, monkeypatch, backend):
    """As on sm_90, where nothing is held."""
    module = import_module("segnext_kernels.nmf._steps")
    monkeypatch.setattr(module, "_most_held", lambda x: 0)
    monkeypatch.setattr(module, "_large", lambda x: True)
    sample = nmf_sample(*shape).to(torch.bfloat16)
    p = module.Problem.of(*sample.leaves)
    assert p.parts > 1 and all(c[0].kwargs["COLUMNS"] == 64 for c in (p.configs, p.configs_of_output))
    check(sample, backend, grad_like(sample.x))


def test_programs_own_whole_tiles(backend):
    """For every kind of problem; and together their sums have indices below 2**31."""
    module = import_module("segnext_kernels.nmf._steps")
    for precision, rank, rows in itertools.product(
        ("split", "rounded", "tf32", "tf32x3", "ieee"), (1, 16, 17, 64, 128), (1, 256, 65535)
    ):
        for batch, most_held, large, lean in itertools.product((1, 16), (0, module.HELD), (False, True), (False, True)):
            p = module.Problem(batch, rows, 1 << 14, rank, precision, most_held, large, lean)
            tiles = [*p.configs, *p.configs_of_output, *p.configs_backward]
            assert not any(p.part % c.kwargs["COLUMNS"] for c in tiles) and p.parts * rows * rank < 2**31


@matrix_layouts
@pytest.mark.parametrize("shape", [(2, 40, 70, 16, 3), (1, 70, 96, 33, 2), (1, 33, 45, 17, 0)], ids=str)
@pytest.mark.parametrize("held", [True, False])
def test_rounded_factors(held, shape, layout, kernels, monkeypatch, backend):
    """An element of y is off by four roundings at most; without steps by its own, since logits are not rounded."""
    monkeypatch.setattr(kernels, "_most_held", lambda x: kernels.HELD if held else 0)
    sample = arranged(nmf_sample(*shape).to(torch.bfloat16), layout)
    got, want = (nmf(*sample.leaves, shape[-1], round_factors=rounds, backend=backend) for rounds in (True, False))
    exact, own = sample.exact()[0], torch.finfo(torch.bfloat16).eps / 2
    assert torch.equal(got, want) == (shape[-1] == 0)
    assert ((got.double() - exact).abs() - 4 * own * exact.abs()).max() <= 2e-5 * exact.abs().max()
    wanted = nmf(sample.x, sample.leaves[1].requires_grad_(), shape[-1], round_factors=True, backend=backend)
    assert_same([wanted.detach()], [want])
    projection = torch.eye(shape[1], requires_grad=True)
    projected = nmf(sample.x, sample.leaves[1].detach(), shape[-1], projection=projection, round_factors=True, backend=backend)
    assert_same([projected.detach()], [want])
