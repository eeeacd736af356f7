"""Argument checks, done once in the public functions. Messages name the argument and its shape, dtype or device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRADIENTS = ("exact", "one_step")
AUTOCAST_DEVICES = ("cpu", "cuda")
PACKED_DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = ("none", "gelu", "relu")
PANEL = 32  # columns of packed weights that lie together


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a computation on ``dtype`` accumulates in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return x.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type)


def transformed() -> bool:
    """Whether torch.func's transforms are at work: then operators run in plain PyTorch, and vmap tells no layout."""
    return torch._C._are_functorch_transforms_active()


def dense_image(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    if transformed() or x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def dense_matrix(x: Tensor) -> Tensor:
    """x itself where it is contiguous or transposed (second dimension fastest), else a contiguous copy."""
    return x if transformed() or x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def msca_strips(x: Tensor, weights: Sequence[Tensor], op: str = "msca_strips", before: int = 0) -> tuple[int, ...]:
    """Checks the arguments of msca_strips and returns its branch sizes; ``before`` tensors stand before the weights in those
    of another operator."""
    _image(op, x)
    _sequence(op, "weights", weights)
    if len(weights) < 2 or len(weights) % 4 != 2:
        raise ValueError(
            f"{op}: weights must hold the 5x5 filter and bias, then row filter, bias, column filter and bias"
            f" for every branch (2 + 4 B tensors), got {len(weights)}"
        )
    if not _alike(weights, x):
        for i, weight in enumerate(weights, before):
            _companion(op, f"weights[{i}]", weight, x)
    channels, sizes = x.shape[1], []
    for i, row_filter in enumerate(weights[2::4]):
        size = row_filter.shape[-1] if row_filter.dim() == 4 else 0
        if size % 2 == 0:
            raise ValueError(
                f"{op}: weights[{before + 2 + 4 * i}] must be a row filter [{channels}, 1, 1, k] with odd k,"
                f" got {list(row_filter.shape)}"
            )
        sizes.append(size)
    bias = (channels,)
    expected = [(channels, 1, 5, 5), bias]
    for size in sizes:
        expected += [(channels, 1, 1, size), bias, (channels, 1, size, 1), bias]
    if [weight.shape for weight in weights] != expected:
        for i, (weight, shape) in enumerate(zip(weights, expected, strict=True), before):
            _shape(op, f"weights[{i}]", weight, shape)
    return tuple(sizes)


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Checks the arguments of dwconv_gelu."""
    _image("dwconv_gelu", x)
    for name, tensor, expected in (("weight", weight, (x.shape[1], 1, 3, 3)), ("bias", bias, (x.shape[1],))):
        _companion("dwconv_gelu", name, tensor, x)
        _shape("dwconv_gelu", name, tensor, expected)


def scale_add(x: Tensor, y: Tensor, scale: Tensor, keep: Tensor | None) -> torch.dtype:
    """Checks the arguments of scale_add and returns the dtype of its result."""
    op = "scale_add"
    _image(op, x)
    for name, tensor, expected in (("y", y, tuple(x.shape)), ("scale", scale, (x.shape[1],)), ("keep", keep, (x.shape[0],))):
        if name == "keep" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        mixed = name != "keep" and (tensor.dtype == torch.float64) != (x.dtype == torch.float64)
        if tensor.dtype not in DTYPES or mixed:
            raise TypeError(f"{op}: {name} must have a floating dtype that goes with x's {x.dtype}, got {tensor.dtype}")
        _same_device(op, name, tensor, x)
        _shape(op, name, tensor, expected)
    if keep is not None and keep.requires_grad:
        raise ValueError(f"{op}: keep gets no gradient, so it must not require one")
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), scale.dtype)


def nmf(x: Tensor, bases: Tensor, steps: int, gradient: str, round_factors: bool) -> None:
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
    whole("nmf", "steps", steps)
    if steps < 0:
        raise ValueError(f"nmf: steps must be at least 0, got {steps}")
    if gradient not in GRADIENTS:
        raise ValueError(f"nmf: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    if not isinstance(round_factors, bool):
        raise TypeError(f"nmf: round_factors must be a bool, got {type(round_factors).__name__}")


def upsample_argmax(logits: Tensor, size: Sequence[int]) -> tuple[int, int]:
    """Checks the arguments of upsample_argmax and returns the size."""
    _logits("upsample_argmax", logits, size)
    return tuple(size)


def upsample_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, weight: Tensor | None) -> None:
    """Checks the arguments of upsample_cross_entropy."""
    op = "upsample_cross_entropy"
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{op}: target must be an integer tensor, got {getattr(target, 'dtype', type(target).__name__)}")
    if target.dim() != 3:
        raise ValueError(f"{op}: target must be [N, H, W], got shape {list(target.shape)}")
    _logits(op, logits, target.shape[1:])
    _same_device(op, "target", target, logits)
    if target.shape[0] != logits.shape[0]:
        raise ValueError(f"{op}: target must have the logits' {logits.shape[0]} images, got shape {list(target.shape)}")
    whole(op, "ignore_index", ignore_index)
    if weight is not None:
        vector(op, "weight", weight, logits.shape[1], logits, accumulator(logits.dtype))


def conv_act(x: Tensor, weight: Tensor, bias: Tensor, kernel_size: int, stride: int, activation: str) -> tuple:
    """Checks the arguments of conv_act and returns them, x in a dense layout."""
    channels_last("conv_act", "x", x[:0] if isinstance(x, Tensor) and x.dim() else x)
    whole("conv_act", "kernel_size", kernel_size)
    whole("conv_act", "stride", stride)
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
    _sequence(op, "weights", weights)
    if len(weights) != 21:
        raise ValueError(f"{op}: weights must be 21 tensors: W1, b1, 14 strips, W3, b3, W2, b2, scale; got {len(weights)}")
    channels, weights = x.shape[1], list(weights)
    for name, i in (("W1", 0), ("W3", 16), ("W2", 18)):
        weights[i : i + 2] = packed(op, name, weights[i], weights[i + 1], channels, x)
        _shape(op, f"the bias of {name}", weights[i + 1], (channels,))
    sizes = msca_strips(x, weights[2:16], op, before=2)
    if sizes != (7, 11, 21):
        raise ValueError(f"{op}: the strips must have branch sizes (7, 11, 21), got {sizes}")
    weights[20] = vector(op, "scale", weights[20], channels, x)
    return x, weights


def mlp(x: Tensor, fc1: Tensor, bias1: Tensor, depthwise: Tensor, depthwise_bias: Tensor, fc2: Tensor, bias2: Tensor) -> tuple:
    """Checks the arguments of mlp and returns them, x in channels_last."""
    x = channels_last("mlp", "x", x)
    fc1, bias1 = packed("mlp", "fc1", fc1, bias1, x.shape[1], x)
    if bias1.shape[0] < 1:
        raise ValueError("mlp: fc1 must have at least one output")
    fc2, bias2 = packed("mlp", "fc2", fc2, bias2, bias1.shape[0], x)
    _shape("mlp", "bias2", bias2, (x.shape[1],))
    depthwise_bias = vector("mlp", "depthwise_bias", depthwise_bias, bias1.shape[0], x)
    if not isinstance(depthwise, Tensor) or depthwise.dtype != torch.float32:
        raise TypeError("mlp: depthwise must be a float32 tensor")
    _same_device("mlp", "depthwise", depthwise, x)
    _shape("mlp", "depthwise", depthwise, (bias1.shape[0], 1, 3, 3))
    return x, fc1, bias1, depthwise.contiguous(), depthwise_bias, fc2, bias2


def group_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, residual: Tensor | None) -> tuple:
    """Checks the arguments of group_norm_relu and returns them, x and the residual in channels_last."""
    op = "group_norm_relu"
    x = channels_last(op, "x", x)
    weight = vector(op, "weight", weight, x.shape[1], x)
    bias = vector(op, "bias", bias, x.shape[1], x)
    whole(op, "groups", groups)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{op}: groups must divide the {x.shape[1]} channels, got {groups}")
    if residual is not None:
        _companion(op, "residual", residual, x)
        _shape(op, "residual", residual, tuple(x.shape))
        residual = channels_last(op, "residual", residual)
    return x, weight, bias, groups, eps, residual


def resize_concat_conv(maps: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor) -> tuple:
    """Checks the arguments of resize_concat_conv and returns them, the maps in channels_last."""
    op = "resize_concat_conv"
    _sequence(op, "maps", maps)
    _sequence(op, "weights", weights)
    if not maps or len(maps) != len(weights):
        raise ValueError(f"{op}: as many weights as maps are needed and at least one, got {len(maps)} and {len(weights)}")
    maps = [channels_last(op, f"maps[{i}]", x) for i, x in enumerate(maps)]
    weights = list(weights)
    for i, x in enumerate(maps):
        _companion(op, f"maps[{i}]", x, maps[0])
        if x.shape[0] != maps[0].shape[0] or x.numel() == 0:
            raise ValueError(f"{op}: maps must have one batch size and not be empty, got {[list(m.shape) for m in maps]}")
        weights[i], bias = packed(op, f"weights[{i}]", weights[i], bias, x.shape[1], x)
    return maps, weights, bias


def channels_last(op: str, name: str, x: Tensor) -> Tensor:
    """Checks an image for inference and returns it in channels_last: itself where it is, else a copy."""
    _tensor(op, name, x, "[N, C, H, W]")
    if x.dtype not in PACKED_DTYPES:
        raise TypeError(f"{op}: {name} must be float32 or bfloat16, got {x.dtype}")
    return x.contiguous(memory_format=torch.channels_last)


def packed(op: str, name: str, weight: Tensor, bias: Tensor, inputs: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Checks packed weights of a linear layer on ``inputs`` values and their bias, which tells the number of outputs, and
    returns them contiguous."""
    if not isinstance(bias, Tensor) or bias.dim() != 1:
        raise TypeError(f"{op}: the bias of {name} must be a tensor [outputs]")
    bias = vector(op, f"the bias of {name}", bias, bias.shape[0], x)
    _companion(op, name, weight, x)
    step = 2 if x.dtype == torch.bfloat16 else 1
    panels = -(-bias.shape[0] // PANEL)
    shape = (panels, inputs, PANEL) if step == 1 else (panels, -(-inputs // step), PANEL, step)
    _shape(op, f"{name}, packed,", weight, shape)
    return weight.contiguous(), bias


def vector(op: str, name: str, tensor: Tensor, count: int, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Checks ``count`` numbers, float32 unless told, on x's device, and returns them contiguous."""
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{op}: {name} must be a {str(dtype).removeprefix('torch.')} tensor, got {found}")
    _same_device(op, name, tensor, x)
    _shape(op, name, tensor, (count,))
    return tensor.contiguous()


def _is_whole(number: object) -> bool:
    return isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool)


def whole(op: str, name: str, number: int) -> None:
    """Checks an int; a bool is none."""
    if not _is_whole(number):
        raise TypeError(f"{op}: {name} must be an int, got {type(number).__name__}")


def _sequence(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a list or tuple of tensors, got {type(tensors).__name__}")


def _logits(op: str, logits: Tensor, size: Sequence[int]) -> None:
    """Checks an image that can be resized to ``size``."""
    _tensor(op, "logits", logits, "[N, C, h, w]")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(_is_whole(n) and n >= 0 for n in size):
        raise ValueError(f"{op}: size must be two whole numbers (H, W), got {size!r}")
    if 0 in logits.shape[1:] and 0 not in size:
        raise ValueError(f"{op}: empty logits {list(logits.shape)} cannot be resized to {list(size)}")


def _image(op: str, x: Tensor) -> None:
    _tensor(op, "x", x, "[N, C, H, W]")


def _tensor(op: str, name: str, tensor: Tensor, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {list(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def _alike(tensors: Sequence[object], x: Tensor) -> bool:
    """Whether all are tensors of x's dtype and device, as they nearly always are: a small image takes less time than asking
    for each of fourteen what else could be allowed."""
    dtype, device = x.dtype, x.device
    return all(isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.device == device for tensor in tensors)


def _companion(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """What comes along with x has its dtype and device; under autocast the operator casts mixed dtypes but float64 itself."""
    if _alike((tensor,), x):
        return
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
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} must be {list(expected)}, got {list(tensor.shape)}")
