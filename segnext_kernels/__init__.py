"""Fused operators for SegNeXt: multi-scale strip convolutions, depthwise convolution with GELU, matrix decomposition."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

import torch

from . import (
    _flops,  # noqa: F401 (registers what the operators count)
    _load,
)
from ._pack import pack
from ._select import explain
from ._select import missing as _missing
from .conv_act import conv_act
from .dwconv_gelu import dwconv_gelu
from .group_norm_relu import group_norm_relu
from .hamburger import hamburger
from .mlp import mlp
from .msca_strips import msca_strips
from .nmf import nmf
from .patch import patch, unpatch
from .resize_concat_conv import resize_concat_conv
from .scale_add import scale_add
from .spatial_attention import spatial_attention
from .upsample_argmax import upsample_argmax
from .upsample_cross_entropy import upsample_cross_entropy

try:
    __version__ = _version("segnext-kernels")
except _NotInstalled:  # a source tree, or a bundle without metadata
    __version__ = "unknown"
__all__ = [
    "build_info",
    "conv_act",
    "dwconv_gelu",
    "explain",
    "group_norm_relu",
    "hamburger",
    "mlp",
    "msca_strips",
    "nmf",
    "pack",
    "patch",
    "resize_concat_conv",
    "scale_add",
    "spatial_attention",
    "unpatch",
    "upsample_argmax",
    "upsample_cross_entropy",
]


def build_info() -> dict[str, object]:
    """What was built, what of it is in use here, and why the rest is not.

    Returns:
        A dictionary of

        - ``version``: of this package.
        - ``isa``: the instruction set in use ("amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline") or None.
        - ``torch_built``, ``compiler``: of the build, None without one.
        - ``torch_running``: the version of the torch in use.
        - ``cuda_architectures``: that the CUDA kernels were compiled for, empty without them.
        - ``missing``: for every absent backend one sentence that says why.
    """
    return {
        "version": __version__,
        "isa": _load.facts.get("isa"),
        "torch_built": _load.facts.get("torch"),
        "torch_running": torch.__version__,
        "compiler": _load.facts.get("compiler"),
        "cuda_architectures": list(_load.cuda_architectures),
        "missing": _missing(),
    }
