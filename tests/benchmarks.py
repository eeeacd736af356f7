"""Small benchmark cases, for the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from bench import case, ceilings, inference, models, operators, output, training
from bench.case import Case
from segnext.model import Config

ERRORS = {torch.float32: 5e-6, torch.bfloat16: 2e-2}  # of the largest value; bfloat16 has 8 bits and sums in PyTorch's order
PLAIN_NMF_ERROR = 4e-2  # of plain PyTorch's decomposition in bfloat16, which rounds the factors some thirty times
MODEL_ERRORS = {torch.float32: 1e-5, torch.bfloat16: 6e-2}  # the same for logits, and the share of labels that differ
TRAINING_ERRORS = {torch.float32: 1e-5, torch.bfloat16: 0.5}  # of the first convolution's gradient, through all of autocast
CHANNELS = 33  # fewer than 17: PyTorch's bfloat16 channels_last convolution with 1 x 21 taps does not always return
TINY = Config((32,) * 4, (1,) * 4, (2,) * 4, decoder_channels=32, rank=4, num_classes=7)
IMAGE = (40, 64)
LIMITS = {"copy_gbytes_per_s": 10.0, "float32_gflops_per_s": 100.0, "bfloat16_gflops_per_s": 200.0}
SMALL = [
    *(
        make(CHANNELS, 9, 6, dtype, batch=2)
        for make in (operators.msca_strips_case, operators.dwconv_gelu_case)
        for dtype in ERRORS
    ),
    operators.nmf_case(6, 35, 3, 2),
    *(operators.upsample_cross_entropy_case(5, (4, 3), (9, 8), dtype, batch=2) for dtype in ERRORS),
    *(operators.upsample_argmax_case(5, (4, 3), (9, 8), dtype, batch=2) for dtype in ERRORS),
    *(inference.conv_act_case(CHANNELS, 8, 5, 3, 2, dtype) for dtype in ERRORS),
    *(inference.spatial_attention_case(CHANNELS, 6, dtype) for dtype in ERRORS),
    *(inference.mlp_case(CHANNELS, 9, 6, dtype) for dtype in ERRORS),
    *(inference.group_norm_relu_case(32, 5, dtype) for dtype in ERRORS),
    *(inference.hamburger_case(32, 5, 3, dtype) for dtype in ERRORS),
    *(inference.resize_concat_conv_case((CHANNELS, 5, 6), 8, 7, dtype) for dtype in ERRORS),
]
MODELS = [
    *(models.logits_case("segnext_tiny", TINY, IMAGE, dtype, batch=2) for dtype in ERRORS),
    *(models.labels_case("segnext_tiny_labels", TINY, IMAGE, dtype) for dtype in ERRORS),
]
TRAINING = [training.training_case("train_tiny", TINY, IMAGE, dtype, batch=2) for dtype in ERRORS]


def turns(chosen: Iterable[Case]) -> list:
    """Every case in every direction with every contender, but for the compiler, which takes long."""
    return [
        pytest.param(case, direction, contender, id=f"{case.name}-{direction}-{contender.label.replace(' ', '-')}")
        for case in chosen
        for direction in case.directions
        for contender in case.contenders
        if not contender.compiled
    ]


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Makes packages look as if they were not installed."""
    find_spec = case.find_spec
    for module in (case, output):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name in packages else find_spec(name))


def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the copy and the products small, hence quick."""
    monkeypatch.setattr(ceilings, "COPY", 1 << 16)
    monkeypatch.setattr(ceilings, "SIDE", 64)
