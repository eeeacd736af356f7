"""Which backend serves a call, and why the others don't. The only place where that is decided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _load, _triton, _validate

INFERENCE_OPERATORS = ("conv_act", "spatial_attention", "mlp", "group_norm_relu", "hamburger", "resize_concat_conv")
OPERATORS = (
    "msca_strips",
    "dwconv_gelu",
    "nmf",
    "scale_add",
    "upsample_argmax",
    "upsample_cross_entropy",
    *INFERENCE_OPERATORS,
)
BACKENDS = ("cuda", "triton", "cpu", "reference")
ON_CPU = BACKENDS[2:]  # the others refuse every tensor there, which need not be found at each call
COMPILED_BRANCHES = (7, 11, 21)
CUDA_OPERATORS = ("msca_strips", "dwconv_gelu")
TRITON_OPERATORS = (*CUDA_OPERATORS, "nmf", "scale_add", "upsample_argmax", "upsample_cross_entropy")
TRITON_ROWS = 1 << 16  # times the rank and the parts that a GPU works on at once: below 2**31
TRITON_RANK = 128  # the highest of a factorisation whose factors fit on the chip
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(backend: str, operator: str, x: Tensor, **details) -> str | None:
    """The reason why a backend cannot serve a call of ``operator`` on ``x``, or None if it can. Details: see explain."""
    if backend == "reference":
        return None
    if backend not in BACKENDS:
        return f"there is no backend {backend!r}; there are {', '.join(BACKENDS)}"
    find = {"cuda": _why_not_cuda, "triton": _why_not_triton, "cpu": _why_not_cpu}[backend]
    return find(operator, x) or _why_not_called(backend, operator, x, **details)


def missing() -> dict[str, str]:
    """For every backend that is absent altogether, why."""
    failures = {"cuda": _load.cuda_failure, "triton": _triton.failure, "cpu": _load.failure}
    return {name: reason for name, reason in failures.items() if reason is not None}


def _why_not_cpu(operator: str, x: Tensor) -> str | None:
    return f"x is on {x.device.type}, these kernels are for the CPU" if x.device.type != "cpu" else _load.failure


def _why_not_cuda(operator: str, x: Tensor) -> str | None:
    if operator not in CUDA_OPERATORS:
        return f"the CUDA kernels are for {' and '.join(CUDA_OPERATORS)}"
    if x.device.type != "cuda":
        return f"x is on {x.device.type}, these kernels are for CUDA"
    if _load.cuda_failure is not None:
        return _load.cuda_failure
    if x.dtype not in GPU_DTYPES:
        return _other_dtype("CUDA", x)
    return _why_not_on_gpu(x.get_device())


def _why_not_triton(operator: str, x: Tensor) -> str | None:
    if operator not in TRITON_OPERATORS:
        return f"the Triton kernels are for {', '.join(TRITON_OPERATORS[:-1])} and {TRITON_OPERATORS[-1]}"
    if _triton.failure is not None:
        return _triton.failure
    if x.device.type != "cuda" and not (x.device.type == "cpu" and _triton.interpreted):
        return f"x is on {x.device.type}, these kernels are for GPUs"
    major, minor = _triton.capability(x)
    if torch.version.hip is None and (major, minor) < (8, 0):
        return f"the Triton kernels are for GPUs from compute capability 8.0 on, this one has {major}.{minor}"
    if torch.version.hip is not None and not (name := _triton.architecture(x)).startswith("gfx9"):
        return f"the Triton kernels are for AMD's CDNA GPUs (gfx9), with wavefronts of 64 threads; this one is {name}"
    if operator == "nmf" and x.dim() == 3 and (x.shape[2] * max(x.shape[1], TRITON_RANK) >= 2**31 or x.shape[1] >= TRITON_ROWS):
        return f"the Triton kernels of nmf are for matrices below 2**31 elements and {TRITON_ROWS} rows, x is {list(x.shape)}"
    if x.dtype not in GPU_DTYPES:
        return _other_dtype("Triton", x)
    return _why_not_interpreted(x) if x.device.type == "cpu" else None


def _why_not_interpreted(x: Tensor) -> str | None:
    dtype = torch.get_autocast_dtype("cpu") if _validate.autocasts(x) else x.dtype
    return "Triton's interpreter cuts bfloat16 off instead of rounding it" if dtype == torch.bfloat16 else None


@_triton.untraced
def _why_not_on_gpu(index: int) -> str | None:
    return _load.why_not_on_gpu(index) if _triton.has_gpu() else None  # tensors without a GPU are fake ones


def _other_dtype(kind: str, x: Tensor) -> str:
    return f"the {kind} kernels are for float32, bfloat16 and float16, x is {str(x.dtype).removeprefix('torch.')}"


def _why_not_called(
    backend: str, operator: str, x: Tensor, branch_sizes: tuple[int, ...] = COMPILED_BRANCHES, rank: int = 1
) -> str | None:
    if type(x).__module__.startswith("torch.distributed."):
        return "of distributed tensors (DTensor) torch knows how plain PyTorch splits the work, not how these kernels would"
    if _transformed():
        return "torch.func's transforms and forward-mode derivatives see through plain PyTorch only"
    if operator == "msca_strips" and branch_sizes != COMPILED_BRANCHES:
        return f"the compiled kernels have branch sizes {COMPILED_BRANCHES}, got {branch_sizes}"
    if backend == "triton" and rank > TRITON_RANK:
        return f"the Triton kernels have ranks up to {TRITON_RANK}, got {rank}"
    return None


def _transformed() -> bool:
    return _validate.transformed() or forward_ad._current_level >= 0


def select(operator: str, backend: str | None, x: Tensor, **details) -> str:
    """The named backend if it can serve the call (else ValueError), or the first that can, but for what torch.compile fuses."""
    if backend is None:
        if operator == "scale_add" and x.device.type == "cuda" and torch.compiler.is_compiling():
            return "reference"  # which torch.compile fuses with what is around it
        for name in ON_CPU if x.device.type == "cpu" and not _triton.interpreted else BACKENDS:
            if why_not(name, operator, x, **details) is None:
                return name
    reason = why_not(backend, operator, x, **details)
    if reason is not None:
        raise ValueError(f"{operator}: backend {backend!r} cannot serve this call: {reason}")
    return backend


def explain(operator: str, x: Tensor, *, branch_sizes: Sequence[int] = COMPILED_BRANCHES, rank: int = 1) -> dict[str, str]:
    """Says for every backend whether it serves a call of ``operator`` on ``x``: "serves", "could serve", or why not.

    Under torch.compile ``scale_add`` on a GPU is plain PyTorch all the same, which is fused with what is around it.

    Args:
        operator: its name, such as "msca_strips".
        x: the operator's first argument, or the first of its maps.
        branch_sizes: of msca_strips.
        rank: of nmf.

    Returns:
        One sentence for every backend, in order of preference.

    Raises:
        TypeError: x is no tensor.
        ValueError: there is no such operator.
    """
    if operator not in OPERATORS:
        raise ValueError(f"explain: there is no operator {operator!r}; there are {', '.join(OPERATORS)}")
    if not isinstance(x, Tensor):
        raise TypeError(f"explain: x must be a tensor, got {type(x).__name__}")
    taken = _validate.PACKED_DTYPES if operator in INFERENCE_OPERATORS else _validate.DTYPES
    if x.dtype not in taken:
        *known, found = (str(dtype).removeprefix("torch.") for dtype in (*taken, x.dtype))
        return dict.fromkeys(BACKENDS, f"{operator} takes {', '.join(known)}; x is {found}")
    answer, served = {}, False
    for name in BACKENDS:
        reason = why_not(name, operator, x, branch_sizes=tuple(branch_sizes), rank=rank)
        answer[name] = reason or ("could serve" if served else "serves")
        served = served or reason is None
    return answer
