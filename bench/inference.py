"""Cases of the operators that fused models are made of; they serve inference alone, so forward is all there is to time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segnext_kernels as kernels

from . import plain
from .case import FROZEN, Case, Work, generator, image_shape, in_both_layouts

GROUPS = 32


def conv_act_case(channels: int, side: int, outputs: int, kernel_size: int, stride: int, dtype: torch.dtype) -> Case:
    """A convolution of [1, channels, side, side] and ReLU."""
    options = kernel_size, stride, "relu"

    def setup() -> list[Tensor]:
        return [image(channels, side), *linear(outputs, channels, kernel_size)]

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        packed, floats = kernels.pack(weight, dtype), bias.float()
        return lambda x: kernels.conv_act(x, packed, floats, *options)

    written = outputs * (side // stride) ** 2
    products = written * channels * kernel_size**2
    shape = f"{image_shape(1, channels, side, side)}-{outputs}-{kernel_size}x{kernel_size}-stride{stride}"
    return _case("conv_act", shape, dtype, setup, fused, partial(plain.conv_act, stride=stride), written, products)


def spatial_attention_case(channels: int, side: int, dtype: torch.dtype) -> Case:
    """The attention of [1, channels, side, side], its projections, gate and shortcut."""

    def setup() -> list[Tensor]:
        draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
        strips = [draw(channels, 1, 5, 5) / 5, draw(channels)]
        for k in (7, 11, 21):
            for size in ((1, k), (k, 1)):
                strips += [draw(channels, 1, *size) / k**0.5, draw(channels)]
        first, gate, second = (linear(channels, channels, 1) for _ in range(3))
        return [image(channels, side), *first, *strips, *gate, *second, draw(channels)]

    def fused(x: Tensor, *weights: Tensor) -> Callable[[Tensor], Tensor]:
        ready = list(weights[:20])
        for i in (0, 16, 18):
            ready[i : i + 2] = kernels.pack(weights[i], dtype), weights[i + 1].float()
        ready.append(weights[20].float())
        return lambda x: kernels.spatial_attention(x, ready)

    pixels = channels * side**2
    products = pixels * (3 * channels + 25 + 2 * (7 + 11 + 21))
    shape = image_shape(1, channels, side, side)
    return _case("spatial_attention", shape, dtype, setup, fused, plain.spatial_attention, pixels, products)


def mlp_case(channels: int, hidden: int, side: int, dtype: torch.dtype) -> Case:
    """The MLP of [1, channels, side, side], widened to ``hidden`` channels."""

    def setup() -> list[Tensor]:
        draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
        depthwise = [draw(hidden, 1, 3, 3) / 3, draw(hidden)]
        return [image(channels, side), *linear(hidden, channels, 1), *depthwise, *linear(channels, hidden, 1)]

    def fused(x: Tensor, fc1: Tensor, bias1: Tensor, *rest: Tensor) -> Callable[[Tensor], Tensor]:
        *depthwise, fc2, bias2 = rest
        ready = [
            kernels.pack(fc1, dtype),
            bias1.float(),
            *(t.float() for t in depthwise),
            kernels.pack(fc2, dtype),
            bias2.float(),
        ]
        return lambda x: kernels.mlp(x, *ready)

    products = side**2 * hidden * (2 * channels + 9)
    shape = f"{image_shape(1, channels, side, side)}-{hidden}"
    return _case("mlp", shape, dtype, setup, fused, plain.mlp, channels * side**2, products)


def group_norm_relu_case(channels: int, side: int, dtype: torch.dtype) -> Case:
    """Group norm of [1, channels, side, side] in 32 groups, with a residual; counted as nine operations a value."""

    def setup() -> list[Tensor]:
        draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
        return [image(channels, side), draw(channels), draw(channels), draw(1, channels, side, side)]

    def fused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Callable[..., Tensor]:
        weight, bias = weight.float(), bias.float()
        return lambda x, residual: kernels.group_norm_relu(x, weight, bias, GROUPS, residual=residual)

    pixels = channels * side**2
    shape = image_shape(1, channels, side, side)
    function = partial(plain.group_norm_relu, groups=GROUPS)
    return _case("group_norm_relu", shape, dtype, setup, fused, function, pixels, 9 * pixels // 2, kept=(0, 3))


def hamburger_case(channels: int, side: int, rank: int, dtype: torch.dtype) -> Case:
    """The Hamburger of [1, channels, side, side] with seven steps.

    Counted is what :func:`segnext_kernels.hamburger` computes: W_in on all pixels, the decomposition's products with x (two a
    step, and two more, of which the last is that of the factors), and those of a factor with itself and of that with the other
    (two a step, and one more).
    """
    steps = 7

    def setup() -> list[Tensor]:
        draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
        bases = F.normalize(draw(1, channels, rank).abs(), dim=1)
        ham_in, ham_out = linear(channels, channels, 1), linear(channels, channels, 1)[:1]
        return [image(channels, side), *ham_in, bases, *ham_out, draw(channels), draw(channels)]

    def fused(x: Tensor, ham_in: Tensor, *rest: Tensor) -> Callable[[Tensor], Tensor]:
        packed = kernels.pack(ham_in, dtype)
        bias, bases, ham_out, *norm = (t.float() for t in rest)
        ham_out, rounded = ham_out.flatten(1), dtype == torch.bfloat16
        return lambda x: kernels.hamburger(x, packed, bias, bases, steps, ham_out, *norm, GROUPS, round_factors=rounded)

    pixels = channels * side**2
    grams = (2 * steps + 1) * (channels + side**2) * rank**2
    products = pixels * (channels + (2 * steps + 2) * rank) + grams
    shape = f"{image_shape(1, channels, side, side)}-rank{rank}"
    function = partial(plain.hamburger, steps=steps, groups=GROUPS)
    return _case("hamburger", shape, dtype, setup, fused, function, pixels, products)


def resize_concat_conv_case(channels: tuple[int, ...], side: int, outputs: int, dtype: torch.dtype) -> Case:
    """Maps of ``channels``, each half as high and wide as the one before, resized, concatenated and projected.

    Counted is projecting each at its own size, and resizing what that gives.
    """
    levels = len(channels)

    def setup() -> list[Tensor]:
        maps = [image(count, side >> i) for i, count in enumerate(channels)]
        weight, bias = linear(outputs, sum(channels), 1)
        return [*maps, weight, bias]

    def fused(*inputs: Tensor) -> Callable[..., Tensor]:
        weight, bias = inputs[levels:]
        ready = [kernels.pack(part, dtype) for part in weight.split(channels, dim=1)]
        floats = bias.float()
        return lambda *maps: kernels.resize_concat_conv(list(maps), ready, floats)

    products = sum(outputs * count * (side >> i) ** 2 for i, count in enumerate(channels))
    products += 4 * (levels - 1) * outputs * side**2
    shape = f"{'+'.join(map(str, channels))}x{side}x{side}-{outputs}"
    written = outputs * side**2
    return _case(
        "resize_concat_conv", shape, dtype, setup, fused, plain.resize_concat_conv, written, products, kept=range(levels)
    )


def image(channels: int, side: int) -> Tensor:
    return torch.randn(1, channels, side, side, generator=generator(), dtype=torch.float64)


def linear(outputs: int, inputs: int, kernel_size: int) -> list[Tensor]:
    """A convolution's filters and bias."""
    draw = partial(torch.randn, generator=generator(), dtype=torch.float64)
    return [draw(outputs, inputs, kernel_size, kernel_size) / (inputs**0.5 * kernel_size), draw(outputs)]


class Packed:
    """What has its weights packed at its first call, which nobody times; models do it when they are fused."""

    def __init__(self, prepare: Callable[..., Callable[..., Tensor]], kept: tuple[int, ...]) -> None:
        self.prepare, self.kept, self.ready = prepare, kept, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.ready is None:
            self.ready = self.prepare(*inputs)
        return self.ready(*(inputs[i] for i in self.kept))


class Fixed(nn.Module):
    """A function of those inputs that are kept; the others are weights."""

    def __init__(self, function: Callable[..., Tensor], kept: tuple[int, ...], *inputs: Tensor) -> None:
        super().__init__()
        self.function, self.kept = function, kept
        self.weights = nn.ParameterList(x for i, x in enumerate(inputs) if i not in kept).requires_grad_(False)

    def forward(self, *kept: Tensor) -> Tensor:
        inputs = list(self.weights)
        for i, x in zip(self.kept, kept, strict=True):
            inputs.insert(i, x)
        return self.function(*inputs)


def _case(
    operator: str,
    shape: str,
    dtype: torch.dtype,
    setup: Callable[[], list[Tensor]],
    prepare: Callable[..., Callable[..., Tensor]],
    function: Callable[..., Tensor],
    written: int,
    products: int,
    kept: tuple[int, ...] | range = (0,),
) -> Case:
    """
    Args:
        prepare: makes the fused operator of those inputs that are kept, of all inputs.
        function: the same in plain PyTorch.
        written, products: output elements and multiply-accumulates.
    """
    kept = tuple(kept)

    def compiled(*inputs: Tensor) -> Callable[..., Tensor]:
        return torch.compile(Fixed(function, kept, *inputs), fullgraph=True, dynamic=False, options=FROZEN)

    ways = {
        "fused": partial(Packed, prepare, kept),
        "PyTorch": lambda: function,
        "torch.compile": partial(Packed, compiled, kept),
    }

    def work(direction: str) -> Work:
        read = sum(prod(tensor.shape) for tensor in setup())
        return Work((read + written) * dtype.itemsize, 2 * products)

    return Case(operator, shape, dtype, setup, function, in_both_layouts(ways), ("forward",), work, gradients=False)
