"""What torch's FlopCounterMode counts for the operators, beside what it counts for plain PyTorch."""

from __future__ import annotations

import pytest
import small
import torch
from operators import FUNCTIONS, compiled, dwconv_gelu_sample, msca_strips_sample, nmf_sample
from torch.utils.flop_counter import FlopCounterMode

import segnext

SAMPLES = [msca_strips_sample((2, 6, 9, 8)), dwconv_gelu_sample((2, 6, 9, 8))]
SAMPLES += [nmf_sample(2, 12, 45, 5, 3, gradient) for gradient in ("exact", "one_step")]


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@compiled
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.operator)
@pytest.mark.parametrize("needed", [(), (0,), (1,), (0, 1)], ids=str)
def test_operators_count_what_plain_pytorch_does(sample, needed, backend):
    def call(backend: str) -> None:
        leaves = [leaf.float().detach().requires_grad_(min(i, 1) in needed) for i, leaf in enumerate(sample.leaves)]
        y = FUNCTIONS[sample.operator](*leaves, **sample.options, backend=backend)
        if y.requires_grad:
            y.sum().backward()

    expected = counted(lambda: call("reference"))
    assert counted(lambda: call(backend)) == expected > 0


@compiled
def test_a_fused_model_counts_what_it_was_made_of(backend):
    model = small.model()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain, fused = (counted(lambda model=model: model(images)) for model in (model, segnext.fuse(model)))
    assert 0.8 * plain < fused <= 1.1 * plain
