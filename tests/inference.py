"""The operators of fused models: sample arguments and the answer in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from operators import arrange, error, generator
from torch import Tensor
from torch.utils._pytree import tree_map

import segnext_kernels as kernels

PACKED_DTYPES = (torch.float32, torch.bfloat16)
# [N, C, H, W] and a number of outputs or widened channels: one pixel, one row, one column, odd, longer than any block
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 1, 40, 16), (2, 16, 37, 1, 33), (1, 33, 2, 2, 150), (2, 17, 5, 37, 65), (1, 2, 3, 300, 7)]
SHAPES += [(3, 33, 33, 13, 100), (1, 32, 40, 64, 256), (1, 320, 9, 8, 128), (1, 7, 130, 3, 31)]
# float32 sums a few hundred products and is then multiplied again; bfloat16 also rounds what passes between the products
TOLERANCE = {torch.float32: 8e-6, torch.bfloat16: 1.2e-2}


class Draw:
    """Random tensors already rounded to ``dtype``, in float64."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, generator()

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(self.dtype).double()

    def matrix(self, outputs: int, inputs: int) -> Tensor:
        return self(outputs, inputs, scale=inputs**-0.5)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).float().double()


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, matrix[:, :, None, None], bias)


def conv_act(shape, dtype, kernel_size=1, stride=1, activation="none"):
    *image, outputs = shape
    draw = Draw(dtype)
    x, bias = draw(*image), draw.floats(outputs)
    weight = draw(outputs, image[1], kernel_size, kernel_size, scale=1 / (kernel_size * image[1] ** 0.5))
    truth = F.conv2d(x, weight, bias, stride, kernel_size // 2)
    truth = {"none": truth, "gelu": F.gelu(truth), "relu": F.relu(truth)}[activation]
    return x.to(dtype), (kernels.pack(weight, dtype), bias.float(), kernel_size, stride, activation), truth


def spatial_attention(shape, dtype):
    image, channels = shape[:4], shape[1]
    draw = Draw(dtype)
    x, matrices = draw(*image), [draw.matrix(channels, channels) for _ in range(3)]
    biases, scale = [draw.floats(channels) for _ in range(3)], draw.floats(channels)
    strips = [draw(channels, 1, 5, 5, scale=0.2), draw(channels)]
    for k in (7, 11, 21):
        for size in ((1, k), (k, 1)):
            strips += [draw(channels, 1, *size, scale=k**-0.5), draw(channels)]
    u = F.gelu(product(x, matrices[0], biases[0]))
    s = kernels.msca_strips(u, strips, backend="reference")
    truth = scale[:, None, None] * x + product(product(s, matrices[1], biases[1]) * u, matrices[2], biases[2])
    packed = [(kernels.pack(m, dtype), b.float()) for m, b in zip(matrices, biases, strict=True)]
    weights = [*packed[0], *(t.to(dtype) for t in strips), *packed[1], *packed[2], scale.float()]
    return x.to(dtype), (weights,), truth


def mlp(shape, dtype, norm=False):
    *image, hidden = shape
    draw, channels = Draw(dtype), shape[1]
    x, fc1, fc2 = draw(*image), draw.matrix(hidden, channels), draw.matrix(channels, hidden)
    bias1, bias2, depthwise, depthwise_bias = (draw.floats(*s) for s in ((hidden,), (channels,), (hidden, 1, 3, 3), (hidden,)))
    wide = F.conv2d(product(x, fc1, bias1), depthwise, depthwise_bias, padding=1, groups=hidden)
    truth = x + product(F.gelu(wide), fc2, bias2)
    floats = [t.float() for t in (bias1, depthwise, depthwise_bias, bias2)]
    rest = (kernels.pack(fc1, dtype), *floats[:3], kernels.pack(fc2, dtype), floats[3])
    factors = (None, None)
    if norm:
        weight, bias = draw.floats(channels), draw.floats(channels)
        deviations = truth - truth.mean(1, keepdim=True)
        truth = deviations / torch.sqrt(deviations.square().mean(1, keepdim=True) + 0.1)
        truth = truth * weight[:, None, None] + bias[:, None, None]
        factors = (weight.float(), bias.float())
    return x.to(dtype), (*rest, *factors, 0.1), truth


def group_norm_relu(shape, dtype, residual=True):
    image, channels = shape[:4], shape[1]
    draw, groups = Draw(dtype), next(g for g in (32, 16, 11, 3, 1) if channels % g == 0)
    x, weight, bias = draw(*image) * 3 + 50, draw.floats(channels), draw.floats(channels)  # a mean far from zero
    x = x.to(dtype).double()
    add = draw(*image) if residual else None
    truth = F.relu(truth_norm(x, groups, weight, bias) + (0 if add is None else add))
    rest = (weight.float(), bias.float(), groups, 1e-5, None if add is None else add.to(dtype))
    return x.to(dtype), rest, truth


def truth_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Group norm as its equation says; PyTorch's own refuses a single value."""
    rows = x.unflatten(1, (groups, -1)).flatten(2)
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / torch.sqrt(rows.square().mean(-1, keepdim=True) + 1e-5)
    return rows.view(x.shape) * weight[:, None, None] + bias[:, None, None]


def hamburger(shape, dtype, steps=3):
    image, channels = shape[:4], shape[1]
    draw, groups = Draw(dtype), next(g for g in (32, 16, 11, 3, 1) if channels % g == 0)
    rank = shape[4] % 70 + 1
    x, ham_in, ham_out = draw(*image), draw.matrix(channels, channels), draw.matrix(channels, channels).float().double()
    bias, weight, norm_bias, bases = (draw.floats(*s) for s in (*((channels,),) * 3, (image[0], channels, rank)))
    bases = bases.abs()
    v = F.relu(product(x, ham_in, bias))
    z = product(kernels.nmf(v.flatten(2), bases, steps, backend="reference").view(x.shape), ham_out)
    truth = F.relu(x + truth_norm(z, groups, weight, norm_bias))
    floats = [t.float() for t in (ham_out, weight, norm_bias)]
    return x.to(dtype), (kernels.pack(ham_in, dtype), bias.float(), bases.float(), steps, *floats, groups, 1e-5, False), truth


def resize_concat_conv(shape, dtype):
    batch, channels, height, width, outputs = shape
    draw = Draw(dtype)
    sizes = [(height, width), (-(-height // 2), -(-width // 2)), (-(-height // 3), -(-width // 5))]
    maps = [draw(batch, channels + 5 * i, *size) for i, size in enumerate(sizes)]
    matrices, bias = [draw.matrix(outputs, m.shape[1]) for m in maps], draw.floats(outputs)
    resized = [F.interpolate(m, (height, width), mode="bilinear", align_corners=False) for m in maps]
    truth = product(torch.cat(resized, 1), torch.cat(matrices, 1), bias)
    return [m.to(dtype) for m in maps], ([kernels.pack(m, dtype) for m in matrices], bias.float()), truth


MAKE = {f.__name__: f for f in (conv_act, spatial_attention, mlp, group_norm_relu, hamburger, resize_concat_conv)}


def channels_last(case: tuple) -> tuple:
    """The arguments as the operators themselves want them."""
    x, rest, _ = case
    shapes = {m.shape for m in (x if isinstance(x, list) else [x])}
    return tree_map(lambda leaf: arrange(leaf, "channels_last") if getattr(leaf, "shape", 0) in shapes else leaf, (x, rest))


def call(operator: str, case: tuple, layout: str = "channels_last", backend: str | None = None) -> Tensor:
    x, rest, _ = case
    x = [arrange(m, layout) for m in x] if isinstance(x, list) else arrange(x, layout)
    return getattr(kernels, operator)(x, *rest, backend=backend)


def check(operator: str, case: tuple, dtype: torch.dtype, layout: str, backend: str) -> None:
    y = call(operator, case, layout, backend)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    found = error(y, case[2])
    assert found <= TOLERANCE[dtype], f"relative error {found:.2e}, allowed {TOLERANCE[dtype]:.1e}"
