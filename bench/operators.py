"""Cases of single operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import segnext_kernels
from segnext_kernels import _select
from segnext_kernels.dwconv_gelu.reference import dwconv_gelu as dwconv_gelu_reference
from segnext_kernels.msca_strips.reference import msca_strips as msca_strips_reference
from segnext_kernels.nmf.reference import nmf as nmf_reference
from segnext_kernels.scale_add.reference import scale_add as scale_add_reference

from . import plain
from .case import DIRECTIONS, Case, Contender, Work, device, generator, image_shape, in_both_layouts

BRANCHES = (7, 11, 21)
Backends = tuple[str | None, ...]


def contenders(
    fused: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    backends: Backends = (None,),
    refusal: Callable[[str | None], str | None] = lambda backend: None,
) -> tuple[Contender, ...]:
    """The fused operator, what users write in plain PyTorch, and that compiled, each in both layouts.

    Args:
        backends: of the operator, each a contender of its own; None for the one that serves.
        refusal: why one of them does not serve here.
    """
    found = ()
    for backend in backends:
        name = f"fused {backend}" if backend else "fused"
        found += in_both_layouts({name: partial(_same, partial(fused, backend=backend))}, partial(refusal, backend))
    compiled = partial(torch.compile, plain, fullgraph=True, dynamic=False)
    return found + in_both_layouts({"PyTorch": partial(_same, plain), "torch.compile": compiled})


def _refusal(operator: str, dtype: torch.dtype, backend: str | None) -> str | None:
    return backend and _select.why_not(backend, operator, torch.empty(1, 1, 1, 1, dtype=dtype, device=device()))


def msca_strips_case(
    channels: int, height: int, width: int, dtype: torch.dtype, batch: int = 1, backends: Backends = (None,)
) -> Case:
    """msca_strips on [batch, channels, height, width]."""

    def setup() -> list[Tensor]:
        draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
        inputs = [draw(batch, channels, height, width), draw(channels, 1, 5, 5) / 5, draw(channels)]
        for k in BRANCHES:
            inputs += [draw(channels, 1, 1, k) / k**0.5, draw(channels), draw(channels, 1, k, 1) / k**0.5, draw(channels)]
        return inputs

    def fused(x: Tensor, *weights: Tensor, backend: str | None) -> Tensor:
        return segnext_kernels.msca_strips(x, weights, backend=backend)

    def reference(x: Tensor, *weights: Tensor) -> Tensor:
        return msca_strips_reference(x, weights)

    pixels = batch * channels * height * width
    filters = channels * (25 + 1 + 2 * (sum(BRANCHES) + len(BRANCHES)))
    flops = 2 * pixels * (25 + 2 * sum(BRANCHES))
    return Case(
        "msca_strips",
        image_shape(batch, channels, height, width),
        dtype,
        setup,
        reference,
        contenders(fused, plain.msca_strips, backends, partial(_refusal, "msca_strips", dtype)),
        DIRECTIONS,
        _work(pixels, filters, flops, dtype),
    )


def dwconv_gelu_case(
    channels: int, height: int, width: int, dtype: torch.dtype, batch: int = 1, backends: Backends = (None,)
) -> Case:
    """dwconv_gelu on [batch, channels, height, width]; GELU's own operations are not counted."""

    def setup() -> list[Tensor]:
        draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
        return [draw(batch, channels, height, width), draw(channels, 1, 3, 3) / 3, draw(channels)]

    pixels = batch * channels * height * width
    return Case(
        "dwconv_gelu",
        image_shape(batch, channels, height, width),
        dtype,
        setup,
        dwconv_gelu_reference,
        contenders(segnext_kernels.dwconv_gelu, plain.dwconv_gelu, backends, partial(_refusal, "dwconv_gelu", dtype)),
        ("forward", "backward"),
        _work(pixels, 10 * channels, 18 * pixels, dtype),
    )


def scale_add_case(channels: int, height: int, width: int, dtype: torch.dtype, batch: int = 2) -> Case:
    """scale_add of two [batch, channels, height, width], of which every image keeps the second."""

    def setup() -> list[Tensor]:
        draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
        image = batch, channels, height, width
        return [draw(*image), draw(*image), draw(channels)]

    def keeping(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, y, scale, **options: function(x, y, scale, x.new_ones(batch), **options)

    pixels = batch * channels * height * width
    return Case(
        "scale_add",
        image_shape(batch, channels, height, width),
        dtype,
        setup,
        keeping(scale_add_reference),
        contenders(keeping(segnext_kernels.scale_add), keeping(plain.scale_add)),
        ("forward", "backward"),
        lambda direction: Work(3 * pixels * dtype.itemsize, 3 * pixels),
    )


def nmf_case(
    depth: int,
    pixels: int,
    rank: int,
    steps: int,
    directions: tuple[str, ...] = DIRECTIONS,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> Case:
    """nmf of [batch, depth, pixels], with the exact gradient; the bases are in the same dtype."""

    def setup() -> list[Tensor]:
        draw = partial(torch.rand, generator=generator(), dtype=torch.float64)
        return [draw(batch, depth, pixels), F.normalize(draw(batch, depth, rank), dim=1)]

    def fused(x: Tensor, bases: Tensor, backend: str | None) -> Tensor:
        return segnext_kernels.nmf(x, bases.float(), steps, backend=backend)

    def reference(x: Tensor, bases: Tensor) -> Tensor:
        return nmf_reference(x, bases, steps)

    product = 2 * depth * pixels * rank  # of x or y with a factor
    gram = 2 * (depth + pixels) * rank * rank  # of a factor with itself, and of that with the other factor
    flops = batch * ((2 + 2 * steps) * product + (1 + 2 * steps) * gram)
    return Case(
        "nmf",
        f"{image_shape(batch, depth, pixels)}-r{rank}-{steps}steps",
        dtype,
        setup,
        reference,
        contenders(fused, partial(plain.nmf, steps=steps)),
        directions,
        _work(batch * depth * pixels, batch * depth * rank, flops, dtype),
    )


def upsample_cross_entropy_case(
    classes: int, size: tuple[int, int], target_size: tuple[int, int], dtype: torch.dtype, batch: int = 1
) -> Case:
    """upsample_cross_entropy of logits [batch, classes, *size] with targets [batch, *target_size], some of them ignored.

    Counted is the upsampling, four multiply-accumulates for each of its elements, and again for the gradient.
    """

    def setup() -> list[Tensor]:
        logits = torch.randn(batch, classes, *size, generator=generator(), dtype=torch.float64)
        target = torch.randint(classes, (batch, *target_size), generator=generator())
        return [logits, torch.where(target == 0, 255, target)]

    small, large = batch * classes * size[0] * size[1], batch * target_size[0] * target_size[1]
    forward = Work(small * dtype.itemsize + large * 8, 8 * classes * large)
    backward = Work(2 * small * dtype.itemsize + large * 8, 8 * classes * large)
    step = Work(backward.bytes, 16 * classes * large)
    return Case(
        "upsample_cross_entropy",
        _resized_shape(batch, classes, size, target_size),
        dtype,
        setup,
        plain.upsample_cross_entropy,
        contenders(segnext_kernels.upsample_cross_entropy, plain.upsample_cross_entropy),
        DIRECTIONS,
        dict(zip(DIRECTIONS, (forward, backward, step), strict=True)).__getitem__,
    )


def upsample_argmax_case(
    classes: int, size: tuple[int, int], label_size: tuple[int, int], dtype: torch.dtype, batch: int = 1
) -> Case:
    """upsample_argmax of logits [batch, classes, *size] to labels [batch, *label_size]; only the upsampling is counted."""

    def setup() -> list[Tensor]:
        return [torch.randn(batch, classes, *size, generator=generator(), dtype=torch.float64)]

    small, large = batch * classes * size[0] * size[1], batch * label_size[0] * label_size[1]
    return Case(
        "upsample_argmax",
        _resized_shape(batch, classes, size, label_size),
        dtype,
        setup,
        partial(plain.upsample_argmax, size=label_size),
        contenders(partial(segnext_kernels.upsample_argmax, size=label_size), partial(plain.upsample_argmax, size=label_size)),
        ("forward",),
        lambda direction: Work(small * dtype.itemsize + large * 8, 8 * classes * large),
        gradients=False,
    )


def _same(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def _resized_shape(batch: int, classes: int, size: tuple[int, int], target_size: tuple[int, int]) -> str:
    return f"{image_shape(batch, classes, *size)}-{image_shape(1, *target_size)}"


def _work(pixels: int, filters: int, flops: int, dtype: torch.dtype) -> Callable[[str], Work]:
    """Of an operator with outputs of the size of its input, all numbers of elements.

    Backward makes two products for each one of forward; that some do forward again is not counted. What forward and backward
    both read is counted once where they are one.
    """
    table = {
        "forward": Work((2 * pixels + filters) * dtype.itemsize, flops),
        "backward": Work((3 * pixels + 2 * filters) * dtype.itemsize, 2 * flops),
        "step": Work((4 * pixels + 2 * filters) * dtype.itemsize, 3 * flops),
    }
    return table.__getitem__
