"""What the operators' tests share: sample inputs, float64 answers, memory layouts and tolerances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import segnext_kernels
from segnext_kernels import _load, _select
from segnext_kernels.dwconv_gelu.reference import dwconv_gelu as dwconv_gelu_reference
from segnext_kernels.msca_strips.reference import msca_strips as msca_strips_reference
from segnext_kernels.nmf.reference import nmf as nmf_reference
from segnext_kernels.scale_add.reference import scale_add as scale_add_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
GRADIENTS = ("exact", "one_step")
BRANCH_SIZES = (7, 11, 21)
IMAGE_LAYOUTS = ("contiguous", "channels_last")
MATRIX_LAYOUTS = ("contiguous", "transposed")
LIBRARIES = sorted(Path(_load.__file__).parent.glob("_C_*.abi3.so"))  # what was built

GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

compiled = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
interpreted = pytest.mark.parametrize("backend", ["triton"], indirect=True)
gpu_dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
image_layouts = pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
matrix_layouts = pytest.mark.parametrize("layout", MATRIX_LAYOUTS)


def _projected(projection: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"projection": projection[0]} if projection else {}


FUNCTIONS = {
    "msca_strips": lambda x, *weights, **options: segnext_kernels.msca_strips(x, list(weights), **options),
    "dwconv_gelu": segnext_kernels.dwconv_gelu,
    "nmf": lambda x, bases, *projection, **options: segnext_kernels.nmf(x, bases, **_projected(projection), **options),
    "scale_add": segnext_kernels.scale_add,
}
REFERENCES = {
    "msca_strips": lambda x, *weights: msca_strips_reference(x, list(weights)),
    "dwconv_gelu": dwconv_gelu_reference,
    "nmf": lambda x, bases, *projection, **options: nmf_reference(x, bases, **_projected(projection), **options),
    "scale_add": scale_add_reference,
}

# [N, C, H, W]: one pixel, one row, one column, smaller than the filters, odd, longer than any block, empty
IMAGES = [(1, 1, 1, 1), (2, 3, 1, 40), (2, 16, 37, 1), (1, 33, 2, 2), (2, 17, 5, 37), (3, 33, 33, 13), (1, 40, 40, 64)]
IMAGES += [(2, 16, 4, 9), (2, 1, 21, 11), (2, 3, 11, 12), (1, 2, 3, 300), (1, 2, 300, 3), (1, 129, 7, 6), (1, 64, 12, 24)]
EMPTY_IMAGES = [(0, 3, 5, 5), (2, 3, 0, 5), (2, 17, 5, 0), (2, 0, 5, 5)]
# [B, D, N, R] and steps: R above D and N, nothing a multiple of anything, empty
MATRICES = [(1, 1, 1, 1, 6), (2, 5, 45, 3, 1), (1, 45, 300, 16, 6), (2, 33, 5, 17, 6), (1, 70, 513, 64, 6)]
MATRICES += [(1, 120, 45, 100, 2), (3, 1, 45, 16, 6), (2, 300, 1, 3, 6), (1, 513, 300, 16, 1), (2, 5, 513, 1, 6)]
MATRICES += [(2, 45, 64, 17, 0), (1, 5, 1, 100, 0), (1, 512, 96, 3, 1)]  # the last: columns that share a set of the caches
MATRICES += [(2, 32, 64, 17, 3), (1, 96, 2080, 16, 6), (1, 64, 32, 100, 2)]  # whole tiles of the processor's matrix unit
EMPTY_MATRICES = [(0, 5, 45, 3, 6), (2, 0, 45, 3, 6), (2, 5, 0, 16, 6)]


@dataclass(frozen=True)
class Sample:
    """One call of an operator: the tensors it takes (x first) and its other arguments."""

    operator: str
    leaves: tuple[Tensor, ...]
    options: dict[str, object] = field(default_factory=dict)

    def __call__(self, backend: str | None = None) -> Tensor:
        return FUNCTIONS[self.operator](*self.leaves, **self.options, backend=backend)

    def exact(self, grad_out: Tensor | None = None) -> list[Tensor]:
        """What :func:`results` should be, computed by the reference in float64 on the same, already rounded, inputs."""
        double = replace(self, leaves=tuple(leaf.detach().double().contiguous().requires_grad_() for leaf in self.leaves))
        y = REFERENCES[self.operator](*double.leaves, **self.options)
        grad_out = torch.ones_like(y) if grad_out is None else grad_out.double()
        return [y.detach(), *torch.autograd.grad(y, double.leaves, grad_out, materialize_grads=True)]

    def to(self, dtype: torch.dtype) -> Sample:
        """Everything in ``dtype``; the bases of nmf in the dtype that its factors are kept in."""
        others = torch.float32 if self.operator == "nmf" and dtype in HALVES else dtype
        x, *rest = self.leaves
        return replace(self, leaves=(x.to(dtype), *(leaf.to(others) for leaf in rest)))

    def on(self, device: str) -> Sample:
        options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()}
        return replace(self, leaves=tuple(leaf.to(device) for leaf in self.leaves), options=options)

    def with_x(self, x: Tensor) -> Sample:
        return replace(self, leaves=(x, *self.leaves[1:]))

    @property
    def x(self) -> Tensor:
        return self.leaves[0]


def msca_strips_sample(shape: Sequence[int], branch_sizes: Iterable[int] = BRANCH_SIZES) -> Sample:
    """x [N, C, H, W] and filters whose output has a magnitude of about one, in float64."""
    draw, channels = generator(), shape[1]
    weights = [filters(channels, 5, 5, draw), normal((channels,), draw)]
    for size in branch_sizes:
        weights += [filters(channels, 1, size, draw), normal((channels,), draw)]
        weights += [filters(channels, size, 1, draw), normal((channels,), draw)]
    return Sample("msca_strips", (normal(shape, draw), *weights))


def dwconv_gelu_sample(shape: Sequence[int]) -> Sample:
    """x [N, C, H, W] and filters whose output has a magnitude of about one, in float64."""
    draw = generator()
    return Sample("dwconv_gelu", (normal(shape, draw), filters(shape[1], 3, 3, draw), normal(shape[1:2], draw)))


def scale_add_sample(shape: Sequence[int], dropped: bool = True) -> Sample:
    """x and y [N, C, H, W] and a scale, in float64; with ``dropped`` also keep, by which every second image loses y."""
    draw = generator()
    keep = torch.tensor([1.25, 0.0], dtype=torch.float64).repeat(shape[0])[: shape[0]]
    leaves = (normal(shape, draw), normal(shape, draw), normal(shape[1:2], draw))
    return Sample("scale_add", leaves, {"keep": keep} if dropped else {})


def nmf_sample(
    batch: int, rows: int, columns: int, rank: int, steps: int, gradient: str = "exact", projected: bool = False
) -> Sample:
    """x [B, D, N] with the exact zeros of a ReLU and bases [B, D, R] with columns of length one, in float64; and a projection
    [D, D] if wanted."""
    draw = generator()
    x = normal((batch, rows, columns), draw).relu_()
    bases = torch.rand((batch, rows, rank), generator=draw, dtype=torch.float64)
    leaves = (x, torch.nn.functional.normalize(bases, dim=1))
    if projected:
        leaves += (normal((rows, rows), draw) / max(rows, 1) ** 0.5,)
    return Sample("nmf", leaves, {"steps": steps, "gradient": gradient})


def require(backend: str) -> None:
    """Skips the test if the backend was not built; one that was built and yet cannot serve is a failure."""
    reason = _select.why_not(backend, "nmf", torch.empty(1, 1, 1))
    if reason is not None:
        (pytest.fail if LIBRARIES and backend != "triton" else pytest.skip)(f"backend {backend!r}: {reason}")


def sample_inputs(operator: str) -> list:
    """The samples that feed the tests of values, gradients and registration, as pytest parameters with readable ids."""
    if operator == "nmf":
        cases = [(*shape, gradient) for shape in MATRICES + EMPTY_MATRICES for gradient in GRADIENTS]
        return [pytest.param(nmf_sample(*case), id="B{}-D{}-N{}-R{}-steps{}-{}".format(*case)) for case in cases]
    make = {"msca_strips": msca_strips_sample, "dwconv_gelu": dwconv_gelu_sample, "scale_add": scale_add_sample}[operator]
    return [pytest.param(make(shape), id="x".join(map(str, shape))) for shape in IMAGES + EMPTY_IMAGES]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def normal(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=draw, dtype=torch.float64)


def filters(channels: int, height: int, width: int, draw: torch.Generator) -> Tensor:
    return normal((channels, 1, height, width), draw) / (height * width) ** 0.5


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape in another memory layout; "expanded" repeats the first of the batch."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    raise ValueError(layout)


def arranged(sample: Sample, layout: str) -> Sample:
    return sample.with_x(arrange(sample.x, layout))


def grad_like(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y)


def results(sample: Sample, backend: str | None = None, grad_out: Tensor | None = None) -> list[Tensor]:
    """y and the gradient of every tensor argument, zero where there is none; ``grad_out`` is one everywhere unless told."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in sample.leaves)
    y = replace(sample, leaves=leaves)(backend)
    grad_out = torch.ones_like(y) if grad_out is None else grad_out
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_out, materialize_grads=True)]


def tolerance(dtype: torch.dtype) -> float:
    """The largest accepted error of a result stored in ``dtype``, relative to the largest magnitude that enters it.

    A sum of n products in float32 is off by about sqrt(n) 2^-24, here at most 8e-6. Half precision is only for storing: what is
    computed in float32 and rounded once is off by half a unit in the last place more.
    """
    if dtype in HALVES:
        return torch.finfo(dtype).eps / 2 + 8e-6
    return {torch.float32: 8e-6, torch.float64: 1e-13}[dtype]


def error(got: Tensor, want: Tensor, floor: float = 1e-30) -> float:
    """The largest absolute difference, relative to the largest magnitude of ``want``; NaN wherever there is one."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(floor)).item()


def check(sample: Sample, backend: str | None = None, grad_out: Tensor | None = None) -> None:
    """Compares y and every gradient with the float64 reference, each to the tolerance of its dtype."""
    got, want, wrong = results(sample, backend, grad_out), sample.exact(grad_out), []
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        expected = sample.leaves[max(i - 1, 0)].dtype
        assert g.dtype == expected, f"{name(i)} is {g.dtype}, expected {expected}"
        floor = cancelling(sample, want) if sample.operator == "nmf" and i == 2 and w.any() else 1e-30
        if not error(g, w, floor) <= tolerance(g.dtype):
            wrong.append(f"{name(i)} {error(g, w, floor):.2e} (allowed {tolerance(g.dtype):.1e})")
    assert not wrong, "relative errors: " + ", ".join(wrong)


def cancelling(sample: Sample, want: list[Tensor]) -> float:
    """The magnitude of the terms whose sum is the gradient of nmf's bases: where the fit is exact they cancel to nothing."""
    x, bases = (leaf.double().abs().max() for leaf in sample.leaves[:2])
    return (x * want[1].abs().max() / bases).item()


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Compares bit for bit."""
    wrong = [name(i) for i, (g, w) in enumerate(zip(got, want, strict=True)) if not torch.equal(g, w)]
    assert not wrong, f"not bit-identical: {', '.join(wrong)}"


def name(index: int) -> str:
    return ("y", "gradient of x")[index] if index < 2 else f"gradient of tensor {index - 2} after x"


def golden(prefix: str) -> dict[str, Tensor]:
    """The golden values below ``prefix``, in float64."""
    with np.load(Path(__file__).with_name("data") / "ops.npz") as archive:
        names = [key for key in archive.files if key.startswith(prefix)]
        return {key.removeprefix(prefix): torch.from_numpy(archive[key]) for key in names}
