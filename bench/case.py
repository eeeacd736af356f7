"""What a benchmark case is: a problem, and everybody who solves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from segnext.export.formats import has_compiler

LAYOUTS = ("contiguous", "channels_last")
DIRECTIONS = ("forward", "backward", "step")  # step is forward and backward together
_device = torch.device("cpu")


class Work(NamedTuple):
    """What a direction needs at least: inputs read once and outputs written once; a multiply-accumulate is two operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Args:
        name: with the layout, what the report calls it.
        layout: of the case's first input, one of ``LAYOUTS``; None for contiguous where there is no choice.
        build: makes the function of the case's inputs; compiling and exporting belong here.
        ours: whether the report compares it with the others, or others with it.
        packages: what has to be installed for it, beyond PyTorch.
        hindrance: why it cannot run here all the same, if it cannot.
    """

    name: str
    layout: str | None
    build: Callable[[], Callable[..., Tensor | tuple[Tensor, ...]]]
    ours: bool = False
    packages: tuple[str, ...] = ()
    hindrance: Callable[[], str | None] = lambda: None

    @property
    def compiled(self) -> bool:
        return "torch.compile" in self.name

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, self.layout)))

    def why_not(self) -> str | None:
        """A sentence if it cannot run here."""
        absent = [package for package in self.packages if find_spec(package) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        if self.compiled and not _compiles():
            return "torch.compile finds no C++ compiler: install one, for example g++, or name it in CXX"
        return self.hindrance()


_compiles = cache(has_compiler)
FROZEN = {"freezing": True}  # torch.compile takes weights as constants: it folds norms and packs them before


def in_both_layouts(
    ways: dict[str, Callable[[], Callable[..., Tensor]]], hindrance: Callable[[], str | None] = lambda: None
) -> tuple[Contender, ...]:
    """Every way by its name, of a contiguous and of a channels_last input; those that are called fused are ours."""
    return tuple(
        Contender(name, layout, build, ours=name.startswith("fused"), hindrance=hindrance)
        for name, build in ways.items()
        for layout in LAYOUTS
    )


@dataclass(frozen=True)
class Case:
    """One problem with everybody who solves it.

    Args:
        operator, shape, dtype: make up the name.
        setup: draws the inputs in float64 or whole numbers, the same at every call.
        reference: in float64 the truth; not timed.
        contenders: who is timed.
        directions: which of ``DIRECTIONS`` are timed.
        work: what each of them needs.
        gradients: whether backward is taken for the inputs, all but whole numbers. Without that a step is one call, of a
            contender that trains and returns several tensors.
        input_dtype: what the inputs are rounded to; ``dtype`` unless told.
        model: whether this is a whole model.
    """

    operator: str
    shape: str
    dtype: torch.dtype
    setup: Callable[[], list[Tensor]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    contenders: tuple[Contender, ...]
    directions: tuple[str, ...]
    work: Callable[[str], Work]
    gradients: bool = True
    input_dtype: torch.dtype | None = None
    model: bool = False

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.shape}/{str(self.dtype).removeprefix('torch.')}"

    @property
    def family(self) -> str:
        """What the report shows in one table: an operator, or models of all sizes."""
        return self.operator.partition("_")[0] if self.model else self.operator

    def inputs(self, layout: str | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The inputs, rounded to the case's dtype and cast to ``dtype``; the first, those of its shape and
        filters in the layout.

        They are drawn on the CPU and lie on :func:`device`.
        """
        given, drawn = self.input_dtype or self.dtype, _drawn(self.setup, device())
        inputs = [tensor.to(given).to(dtype or given) if tensor.is_floating_point() else tensor for tensor in drawn]
        first, layout = inputs[0], layout or "contiguous"
        inputs = [lay_out(one, layout) if one.dim() == 4 or one.shape == first.shape else one for one in inputs]
        return [tensor.requires_grad_(self.gradients and tensor.is_floating_point()) for tensor in inputs]

    def grad_out(self, y: Tensor) -> Tensor:
        """The gradient that backward starts from, in y's dtype and layout."""
        return torch.empty_like(y).copy_(_normal(y.shape, y.device).to(self.dtype))

    def present(self) -> tuple[Contender, ...]:
        """The contenders that can run here."""
        return tuple(contender for contender in self.contenders if contender.why_not() is None)

    def contender(self, label: str) -> Contender:
        """The contender of that label; ValueError if there is none."""
        found = {contender.label: contender for contender in self.contenders}
        if label not in found:
            raise ValueError(f"{self.name} has no contender {label!r}; there are {', '.join(found)}")
        return found[label]


@lru_cache(maxsize=1)  # all contenders of a case have the same, and drawing takes longer than they do on a GPU
def _drawn(setup: Callable[[], list[Tensor]], where: torch.device) -> list[Tensor]:
    return [tensor.to(where) for tensor in setup()]


@lru_cache(maxsize=1)
def _normal(shape: torch.Size, where: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator(), dtype=torch.float64).to(where)


def forget_inputs() -> None:
    """Frees what the last inputs and gradients were rounded from, which is kept for the next contender."""
    _drawn.cache_clear()
    _normal.cache_clear()


def device() -> torch.device:
    """Where contenders run."""
    return _device


def run_on(name: str) -> None:
    """Chooses :func:`device`; PyTorch's default stays, since with another one every call of a function goes through Python."""
    global _device
    _device = torch.device(name)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x [N, C, ...] with the last dimension fastest ("contiguous"), or its channels ("channels_last")."""
    return x.contiguous() if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def image_shape(batch: int, *sizes: int) -> str:
    """A shape in a case's name; a batch of one goes without saying."""
    return "x".join(map(str, sizes if batch == 1 else (batch, *sizes)))
