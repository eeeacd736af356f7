"""Argument checks, done once in the public functions. Messages name the argument and its shape, dtype or device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRADIENTS = ("exact", "one_step")
AUTOCAST_DEVICES = ("cpu", "cuda")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a computation on ``dtype`` accumulates in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return x.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type)


def dense_image(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def dense_matrix(x: Tensor) -> Tensor:
    """x itself where it is contiguous or transposed (second dimension fastest), else a contiguous copy."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def msca_strips(x: Tensor, weights: Sequence[Tensor]) -> tuple[int, ...]:
    """Checks the arguments of msca_strips and returns its branch sizes."""
    _image("msca_strips", x)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"msca_strips: weights must be a list or tuple of tensors, got {type(weights).__name__}")
    if len(weights) < 2 or len(weights) % 4 != 2:
        raise ValueError(
            "msca_strips: weights must hold the 5x5 filter and bias, then row filter, bias, column filter and bias"
            f" for every branch (2 + 4 B tensors), got {len(weights)}"
        )
    channels, sizes = x.shape[1], []
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        _companion("msca_strips", name, weight, x)
        branch, role = divmod(i - 2, 4)
        if i == 0:
            expected = (channels, 1, 5, 5)
        elif i == 1 or role % 2:
            expected = (channels,)
        elif role == 0:
            size = weight.shape[-1] if weight.dim() == 4 else 0
            if size % 2 == 0:
                raise ValueError(
                    f"msca_strips: {name} must be a row filter [{channels}, 1, 1, k] with odd k, got {list(weight.shape)}"
                )
            sizes.append(size)
            expected = (channels, 1, 1, size)
        else:
            expected = (channels, 1, sizes[branch], 1)
        _shape("msca_strips", name, weight, expected)
    return tuple(sizes)


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Checks the arguments of dwconv_gelu."""
    _image("dwconv_gelu", x)
    for name, tensor, expected in (("weight", weight, (x.shape[1], 1, 3, 3)), ("bias", bias, (x.shape[1],))):
        _companion("dwconv_gelu", name, tensor, x)
        _shape("dwconv_gelu", name, tensor, expected)


def nmf(x: Tensor, bases: Tensor, steps: int, gradient: str) -> None:
    """Checks the arguments of nmf."""
    _tensor("nmf", "x", x, "[B, D, N]")
    _tensor("nmf", "bases", bases, "[B, D, R]")
    if bases.shape[:2] != x.shape[:2] or bases.shape[2] < 1:
        raise ValueError(
            f"nmf: bases must be [B, D, R] = [{x.shape[0]}, {x.shape[1]}, >= 1] for x {list(x.shape)}, got {list(bases.shape)}"
        )
    if bases.dtype not in (x.dtype, accumulator(x.dtype)):
        allowed = " or ".join(dict.fromkeys((str(x.dtype), str(accumulator(x.dtype)))))
        raise TypeError(f"nmf: bases must be {allowed} for x of {x.dtype}, got {bases.dtype}")
    _same_device("nmf", "bases", bases, x)
    if isinstance(steps, bool) or not isinstance(steps, (int, torch.SymInt)):
        raise TypeError(f"nmf: steps must be an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"nmf: steps must be at least 0, got {steps}")
    if gradient not in GRADIENTS:
        raise ValueError(f"nmf: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")


def _image(op: str, x: Tensor) -> None:
    _tensor(op, "x", x, "[N, C, H, W]")


def _tensor(op: str, name: str, tensor: Tensor, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {list(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def _companion(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """What comes along with x has its dtype and device; under autocast the operator casts mixed dtypes but float64 itself."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    mended = autocasts(x) and torch.float64 not in (x.dtype, tensor.dtype)
    if tensor.dtype != x.dtype and not mended:
        raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    _same_device(op, name, tensor, x)


def _same_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")


def _shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must be {list(expected)}, got {list(tensor.shape)}")
