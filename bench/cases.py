"""The registry of benchmark cases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from segnext.model import SIZES

from .case import Case
from .inference import (
    conv_act_case,
    group_norm_relu_case,
    hamburger_case,
    mlp_case,
    resize_concat_conv_case,
    spatial_attention_case,
)
from .models import labels_case, logits_case
from .operators import (
    dwconv_gelu_case,
    msca_strips_case,
    nmf_case,
    scale_add_case,
    upsample_argmax_case,
    upsample_cross_entropy_case,
)
from .training import training_case

DTYPES = (torch.float32, torch.bfloat16)
T_STAGES = ((32, 128), (64, 64), (160, 32), (256, 16))  # channels, side of the feature map of a 512 x 512 image
B_STAGES = ((64, 128), (128, 64), (320, 32), (512, 16))
T_MLPS = ((256, 128), (512, 64), (640, 32), (1024, 16))
CITYSCAPES = replace(SIZES["t"], num_classes=19)


def _registry() -> Iterable[Case]:
    for dtype in DTYPES:
        for channels, side in (*T_STAGES, *B_STAGES):
            yield msca_strips_case(channels, side, side, dtype)
    for dtype in DTYPES:
        for channels, side in T_MLPS:
            yield dwconv_gelu_case(channels, side, side, dtype)
    for dtype in DTYPES:
        for channels, side in T_STAGES:
            yield scale_add_case(channels, side, side, dtype)
    for depth, rank in ((256, 16), (1024, 64)):
        yield nmf_case(depth, 4096, rank, 7, ("forward",))
        yield nmf_case(depth, 4096, rank, 6, ("backward", "step"))
    for dtype in DTYPES:
        yield upsample_cross_entropy_case(150, (64, 64), (512, 512), dtype, batch=2)
    for dtype in DTYPES:
        yield upsample_argmax_case(150, (64, 64), (512, 512), dtype)
    for dtype in DTYPES:
        yield conv_act_case(256, 64, 256, 1, 1, dtype)
        yield conv_act_case(32, 128, 64, 3, 2, dtype)
        for channels, side in T_STAGES:
            yield spatial_attention_case(channels, side, dtype)
        for (channels, side), (hidden, _) in zip(T_STAGES, T_MLPS, strict=True):
            yield mlp_case(channels, hidden, side, dtype)
        yield group_norm_relu_case(256, 64, dtype)
        yield hamburger_case(256, 64, 16, dtype)
        yield hamburger_case(1024, 64, 64, dtype)
        yield resize_concat_conv_case((64, 160, 256), 64, 256, dtype)
    for dtype in DTYPES:
        for size, config in SIZES.items():
            yield logits_case(f"segnext_{size}", config, (512, 512), dtype)
    for dtype in DTYPES:
        yield labels_case("segnext_t_labels", CITYSCAPES, (1024, 2048), dtype)
    for dtype in DTYPES:
        yield training_case("train_t", SIZES["t"], (512, 512), dtype, batch=2)


def _gpu_registry() -> Iterable[Case]:
    """As many images at a time as fill a GPU; of the operators with kernels in CUDA and in Triton both."""
    batch, both = 16, ("cuda", "triton")
    for dtype in DTYPES:
        for channels, side in (*T_STAGES, *B_STAGES):
            yield msca_strips_case(channels, side, side, dtype, batch, both)
    for dtype in DTYPES:
        for channels, side in T_MLPS:
            yield dwconv_gelu_case(channels, side, side, dtype, batch, both)
    for dtype in DTYPES:
        for channels, side in T_STAGES:
            yield scale_add_case(channels, side, side, dtype, batch)
    for dtype in DTYPES:
        for depth, rank in ((256, 16), (1024, 64)):
            yield nmf_case(depth, 4096, rank, 7, ("forward",), dtype, batch)
            yield nmf_case(depth, 4096, rank, 6, ("backward", "step"), dtype, batch)
    for dtype in DTYPES:
        yield upsample_cross_entropy_case(150, (64, 64), (512, 512), dtype, batch)
    for dtype in DTYPES:
        yield upsample_argmax_case(150, (64, 64), (512, 512), dtype, batch)
    for images in (1, batch):
        for size, config in SIZES.items():
            yield logits_case(f"segnext_{size}", config, (512, 512), torch.bfloat16, images, on_gpu=True)
    for dtype in DTYPES:
        yield training_case("train_t", SIZES["t"], (512, 512), dtype, batch, on_gpu=True)


CASES: dict[str, Case] = {case.name: case for case in _registry()}
GPU_CASES: dict[str, Case] = {case.name: case for case in _gpu_registry()}


def select(pattern: str = "*", device: str = "cpu") -> list[Case]:
    """The cases registered for the device whose name contains the shell pattern; ValueError if there is none."""
    cases = CASES if device == "cpu" else GPU_CASES
    found = [case for name, case in cases.items() if fnmatchcase(name, f"*{pattern}*")]
    if not found:
        raise ValueError(f"no benchmark case fits {pattern!r}; there are {', '.join(cases)}")
    return found
