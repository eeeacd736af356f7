"""Argument checks, done once in the public functions. Messages name the argument and its shape, dtype or device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PACKED_DTYPES = (torch.float32, torch.bfloat16)  # of the operators that serve inference alone
GRADIENTS = ("exact", "one_step")
MOST_STEPS = 1 << 20
AUTOCAST_DEVICES = ("cpu", "cuda")


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


def channels_last(x: Tensor) -> Tensor:
    """x in channels_last, itself where it is; under torch.func's transforms, where no layout can be asked for, as it is."""
    return x if transformed() else x.contiguous(memory_format=torch.channels_last)


def dense_matrix(x: Tensor) -> Tensor:
    """x itself where it is contiguous or transposed (second dimension fastest), else a contiguous copy."""
    return x if transformed() or x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def msca_strips(x: Tensor, weights: Sequence[Tensor], op: str = "msca_strips", before: int = 0) -> tuple[int, ...]:
    """Checks the arguments of msca_strips and returns its branch sizes; ``before`` tensors stand before the weights in those
    of another operator."""
    _image(op, x)
    check_sequence(op, "weights", weights)
    if len(weights) < 2 or len(weights) % 4 != 2:
        raise ValueError(
            f"{op}: weights must hold the 5x5 filter and bias, then row filter, bias, column filter and bias"
            f" for every branch (2 + 4 B tensors), got {len(weights)}"
        )
    check_filters(op, weights, x, lambda i: f"weights[{before + i}]")
    channels, sizes, shapes = x.shape[1], [], [weight.shape for weight in weights]
    for i, row_filter in enumerate(shapes[2::4]):
        size = row_filter[3] if len(row_filter) == 4 else 0
        if size % 2 == 0:
            raise ValueError(
                f"{op}: weights[{before + 2 + 4 * i}] must be a row filter [{channels}, 1, 1, k] with odd k,"
                f" got {list(row_filter)}"
            )
        sizes.append(size)
    bias = (channels,)
    expected = [(channels, 1, 5, 5), bias]
    for size in sizes:
        expected += [(channels, 1, 1, size), bias, (channels, 1, size, 1), bias]
    if shapes != expected:
        for i, (weight, shape) in enumerate(zip(weights, expected, strict=True), before):
            check_shape(op, f"weights[{i}]", weight, shape)
    return tuple(sizes)


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Checks the arguments of dwconv_gelu."""
    _image("dwconv_gelu", x)
    check_filters("dwconv_gelu", (weight, bias), x, ("weight", "bias").__getitem__)
    check_shape("dwconv_gelu", "weight", weight, (x.shape[1], 1, 3, 3))
    check_shape("dwconv_gelu", "bias", bias, (x.shape[1],))


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
        check_device(op, name, tensor, x)
        check_shape(op, name, tensor, expected)
    if keep is not None and keep.requires_grad:
        raise ValueError(f"{op}: keep gets no gradient, so it must not require one")
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), scale.dtype)


def nmf(x: Tensor, bases: Tensor, steps: int, gradient: str, round_factors: bool, projection: Tensor | None) -> None:
    """Checks the arguments of nmf."""
    check_tensor("nmf", "x", x, "[B, D, N]")
    check_bases("nmf", bases, tuple(x.shape[:2]), (x.dtype, accumulator(x.dtype)), x)
    check_updates("nmf", steps, round_factors)
    check_gradient("nmf", gradient)
    if projection is not None:
        same = isinstance(projection, Tensor) and projection.dtype == x.dtype
        floats("nmf", "projection", projection, (x.shape[1],) * 2, x, x.dtype if same else accumulator(x.dtype))


def check_bases(op: str, bases: Tensor, sizes: tuple[int, int], dtypes: Sequence[torch.dtype], x: Tensor) -> None:
    """Checks the initial bases of a decomposition of matrices of ``sizes``: how many and of how many rows."""
    check_tensor(op, "bases", bases, "[B, D, R]")
    if bases.shape[:2] != sizes or bases.shape[2] < 1:
        raise ValueError(
            f"{op}: bases must be [B, D, R] = [{sizes[0]}, {sizes[1]}, >= 1] for x {list(x.shape)}, got {list(bases.shape)}"
        )
    if bases.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise TypeError(f"{op}: bases must be {allowed} for x of {x.dtype}, got {bases.dtype}")
    check_device(op, "bases", bases, x)


def check_gradient(op: str, gradient: str) -> None:
    if gradient not in GRADIENTS:
        raise ValueError(f"{op}: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")


def check_updates(op: str, steps: int, round_factors: bool) -> None:
    """Checks how often factors are updated and whether they may be rounded."""
    whole(op, "steps", steps)
    if not 0 <= steps <= MOST_STEPS:
        raise ValueError(f"{op}: steps must be between 0 and {MOST_STEPS}, got {steps}")
    if not isinstance(round_factors, bool):
        raise TypeError(f"{op}: round_factors must be a bool, got {type(round_factors).__name__}")


def upsample_argmax(logits: Tensor, size: Sequence[int]) -> tuple[int, int]:
    """Checks the arguments of upsample_argmax and returns the size."""
    _logits("upsample_argmax", logits, size)
    return tuple(n if isinstance(n, torch.SymInt) else int(n) for n in size)


def upsample_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, weight: Tensor | None) -> None:
    """Checks the arguments of upsample_cross_entropy."""
    op = "upsample_cross_entropy"
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{op}: target must be an integer tensor, got {getattr(target, 'dtype', type(target).__name__)}")
    if target.dim() != 3:
        raise ValueError(f"{op}: target must be [N, H, W], got shape {list(target.shape)}")
    _logits(op, logits, target.shape[1:])
    check_device(op, "target", target, logits)
    if target.shape[0] != logits.shape[0]:
        raise ValueError(f"{op}: target must have the logits' {logits.shape[0]} images, got shape {list(target.shape)}")
    whole(op, "ignore_index", ignore_index)
    if weight is not None:
        floats(op, "weight", weight, (logits.shape[1],), logits, accumulator(logits.dtype))


def floats(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Checks numbers of a dtype, float32 unless told, on x's device, and returns them contiguous."""
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{op}: {name} must be a {str(dtype).removeprefix('torch.')} tensor, got {found}")
    check_device(op, name, tensor, x)
    check_shape(op, name, tensor, shape)
    return tensor.contiguous()


def _is_whole(number: object) -> bool:
    """Whether it is a whole number, NumPy's too, or what torch.compile or torch.jit.trace have in its place."""
    traced = isinstance(number, Tensor) and torch.jit.is_tracing()
    return traced or (isinstance(number, (Integral, torch.SymInt)) and not isinstance(number, bool))


def whole(op: str, name: str, number: int) -> None:
    """Checks an int; a bool is none."""
    if not _is_whole(number):
        raise TypeError(f"{op}: {name} must be an int, got {type(number).__name__}")


def check_sequence(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    if not isinstance(tensors, (list, tuple, torch.nn.ParameterList)):
        raise TypeError(f"{op}: {name} must be a list or tuple of tensors, got {type(tensors).__name__}")


def _logits(op: str, logits: Tensor, size: Sequence[int]) -> None:
    """Checks an image that can be resized to ``size``."""
    check_tensor(op, "logits", logits, "[N, C, h, w]")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(_is_whole(n) and n >= 0 for n in size):
        raise ValueError(f"{op}: size must be two whole numbers (H, W), got {size!r}")
    if logits.shape[1] == 0 or (0 in logits.shape[2:] and 0 not in size):
        raise ValueError(f"{op}: empty logits {list(logits.shape)} cannot be resized to {list(size)}")


def _image(op: str, x: Tensor) -> None:
    check_tensor(op, "x", x, "[N, C, H, W]")


def check_tensor(op: str, name: str, tensor: Tensor, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {tensor.layout}")
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {list(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def _alike(tensors: Sequence[object], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all are tensors of this dtype and on this device, as they nearly always are: a small image takes less time than
    asking for each of fourteen what else could be allowed."""
    return all(isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.device == device for tensor in tensors)


def check_filters(op: str, filters: Sequence[Tensor], x: Tensor, name: Callable[[int], str]) -> None:
    """Filters come along with x, or are all float32 beside 16 bits; ``name`` tells what the i-th is called."""
    if _alike(filters, x.dtype, x.device) or _alike(filters, accumulator(x.dtype), x.device):
        return
    otherwise = " (or with all others float32)" if accumulator(x.dtype) != x.dtype else ""
    for i, tensor in enumerate(filters):
        check_companion(op, name(i), tensor, x, otherwise)


def check_companion(op: str, name: str, tensor: Tensor, x: Tensor, otherwise: str = "") -> None:
    """What comes along with x has its dtype and device; under autocast the operator casts mixed dtypes but float64 itself."""
    if _alike((tensor,), x.dtype, x.device):
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    mended = autocasts(x) and tensor.dtype in DTYPES and torch.float64 not in (x.dtype, tensor.dtype)
    if tensor.dtype != x.dtype and not mended:
        raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}{otherwise}, got {tensor.dtype}")
    check_device(op, name, tensor, x)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} must be {list(expected)}, got {list(tensor.shape)}")
