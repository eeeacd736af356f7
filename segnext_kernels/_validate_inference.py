"""Argument checks of the operators that serve inference alone; each returns the arguments as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from . import _validate
from ._validate import (
    check_bases,
    check_companion,
    check_sequence,
    check_shape,
    check_tensor,
    dense_image,
    floats,
    msca_strips,
    whole,
)

ACTIVATIONS = ("none", "gelu", "relu")
PANEL = 32  # columns of packed weights that lie together


def conv_act(x: Tensor, weight: Tensor, bias: Tensor, kernel_size: int, stride: int, activation: str) -> tuple:
    """Checks the arguments of conv_act and returns them, x in a dense layout."""
    channels_last("conv_act", "x", x[:0] if isinstance(x, Tensor) and x.dim() else x)
    if kernel_size < 1 or kernel_size % 2 == 0 or stride < 1:
        raise ValueError(f"conv_act: kernel_size must be odd and stride at least 1, got {kernel_size} and {stride}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv_act: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    weight, bias = packed("conv_act", "weight", weight, bias, x.shape[1] * kernel_size**2, x)
    return dense_image(x), weight, bias, kernel_size, stride, activation


def spatial_attention(x: Tensor, weights: Sequence[Tensor]) -> tuple:
    """Checks the arguments of spatial_attention and returns them, x in channels_last."""
    op = "spatial_attention"
    x = channels_last(op, "x", x)
    check_sequence(op, "weights", weights)
    if len(weights) != 21:
        raise ValueError(f"{op}: weights must be 21 tensors: W1, b1, 14 strips, W3, b3, W2, b2, scale; got {len(weights)}")
    channels, weights = x.shape[1], list(weights)
    for name, i in (("W1", 0), ("W3", 16), ("W2", 18)):
        weights[i : i + 2] = packed(op, name, weights[i], weights[i + 1], channels, x)
        check_shape(op, f"the bias of {name}", weights[i + 1], (channels,))
    sizes = msca_strips(x, weights[2:16], op, before=2)
    if sizes != (7, 11, 21):
        raise ValueError(f"{op}: the strips must have branch sizes (7, 11, 21), got {sizes}")
    weights[20] = floats(op, "scale", weights[20], (channels,), x)
    return x, weights


def mlp(
    x: Tensor,
    fc1: Tensor,
    bias1: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    fc2: Tensor,
    bias2: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple:
    """Checks the arguments of mlp and returns them, x in channels_last."""
    x = channels_last("mlp", "x", x)
    fc1, bias1 = packed("mlp", "fc1", fc1, bias1, x.shape[1], x)
    if bias1.shape[0] < 1:
        raise ValueError("mlp: fc1 must have at least one output")
    fc2, bias2 = packed("mlp", "fc2", fc2, bias2, bias1.shape[0], x)
    check_shape("mlp", "bias2", bias2, (x.shape[1],))
    depthwise_bias = floats("mlp", "depthwise_bias", depthwise_bias, (bias1.shape[0],), x)
    depthwise = floats("mlp", "depthwise", depthwise, (bias1.shape[0], 1, 3, 3), x)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("mlp: norm_weight and norm_bias must be given together")
    if norm_weight is not None:
        norm_weight = floats("mlp", "norm_weight", norm_weight, (x.shape[1],), x)
        norm_bias = floats("mlp", "norm_bias", norm_bias, (x.shape[1],), x)
    return x, fc1, bias1, depthwise, depthwise_bias, fc2, bias2, norm_weight, norm_bias, eps


def group_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, residual: Tensor | None) -> tuple:
    """Checks the arguments of group_norm_relu and returns them, x and the residual in channels_last."""
    op = "group_norm_relu"
    x = channels_last(op, "x", x)
    weight, bias = group_norm(op, {"weight": weight, "bias": bias}, groups, x)
    if residual is not None:
        check_companion(op, "residual", residual, x)
        check_shape(op, "residual", residual, tuple(x.shape))
        residual = channels_last(op, "residual", residual)
    return x, weight, bias, groups, eps, residual


def hamburger(
    x: Tensor,
    ham_in: Tensor,
    bias: Tensor,
    bases: Tensor,
    steps: int,
    ham_out: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: int,
    eps: float,
    round_factors: bool,
) -> tuple:
    """Checks the arguments of hamburger and returns them, x in channels_last."""
    op = "hamburger"
    x = channels_last(op, "x", x)
    channels = x.shape[1]
    ham_in, bias = packed(op, "ham_in", ham_in, bias, channels, x)
    check_shape(op, "the bias of ham_in", bias, (channels,))
    check_bases(op, bases, tuple(x.shape[:2]), (x.dtype, torch.float32), x)
    ham_out = floats(op, "ham_out", ham_out, (channels, channels), x)
    norm = group_norm(op, {"norm_weight": norm_weight, "norm_bias": norm_bias}, groups, x)
    return x, ham_in, bias, bases.float().contiguous(), steps, ham_out, *norm, groups, eps, round_factors


def group_norm(op: str, factors: dict[str, Tensor], groups: int, x: Tensor) -> tuple[Tensor, ...]:
    """Checks a group norm of x, its weight and bias by the names of the arguments, and returns them contiguous."""
    factors = tuple(floats(op, name, factor, (x.shape[1],), x) for name, factor in factors.items())
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{op}: groups must divide the {x.shape[1]} channels, got {groups}")
    return factors


def check_groups(op: str, groups: int, eps: float) -> None:
    """Checks the numbers of a group norm, before the kernel is called, which would accept a bool."""
    whole(op, "groups", groups)
    number(op, "eps", eps)


def number(op: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def resize_concat_conv(maps: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor) -> tuple:
    """Checks the arguments of resize_concat_conv and returns them, the maps in channels_last."""
    op = "resize_concat_conv"
    check_sequence(op, "maps", maps)
    check_sequence(op, "weights", weights)
    if not maps or len(maps) != len(weights):
        raise ValueError(f"{op}: as many weights as maps are needed and at least one, got {len(maps)} and {len(weights)}")
    maps = [channels_last(op, f"maps[{i}]", x) for i, x in enumerate(maps)]
    weights = list(weights)
    for i, x in enumerate(maps):
        check_companion(op, f"maps[{i}]", x, maps[0])
        if x.shape[0] != maps[0].shape[0] or 0 in x.shape[2:]:
            raise ValueError(
                f"{op}: maps must share one batch size and have at least one pixel each, got {[list(m.shape) for m in maps]}"
            )
        weights[i], bias = packed(op, f"weights[{i}]", weights[i], bias, x.shape[1], x)
    return maps, weights, bias


def channels_last(op: str, name: str, x: Tensor) -> Tensor:
    """Checks an image for inference and returns it in channels_last: itself where it is, else a copy."""
    check_tensor(op, name, x, "[N, C, H, W]")
    if x.dtype not in _validate.PACKED_DTYPES:
        raise TypeError(f"{op}: {name} must be float32 or bfloat16, got {x.dtype}")
    return _validate.channels_last(x)


def packed(op: str, name: str, weight: Tensor, bias: Tensor, inputs: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Checks packed weights of a linear layer on ``inputs`` values and their bias, which tells the number of outputs, and
    returns them contiguous."""
    if inputs < 1:
        raise ValueError(f"{op}: {name} must have at least one input, x is {list(x.shape)}")
    check_tensor(op, f"the bias of {name}", bias, "[outputs]")
    bias = floats(op, f"the bias of {name}", bias, (bias.shape[0],), x)
    check_companion(op, name, weight, x)
    step = 2 if x.dtype == torch.bfloat16 else 1
    panels = -(-bias.shape[0] // PANEL)
    shape = (panels, inputs, PANEL) if step == 1 else (panels, -(-inputs // step), PANEL, step)
    check_shape(op, f"{name}, packed (segnext_kernels.pack),", weight, shape)
    return weight.contiguous(), bias
