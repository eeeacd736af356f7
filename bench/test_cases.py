"""The registry under pytest-benchmark: ``pytest bench/ -k "msca_strips and float32 and fused"``."""

import pytest
import torch

from .cases import CASES
from .measure import Runner

FORWARD, BACKWARD = (
    [
        pytest.param(case, contender, id=f"{case.name}-{contender.label.replace(' ', '-')}")
        for case in CASES.values()
        if direction in case.work
        for contender in case.contenders
    ]
    for direction in ("forward", "backward")
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize(("case", "contender"), FORWARD)
def test_forward(benchmark, case, contender):
    benchmark.group = f"{case.name} forward"
    runner = Runner(case, contender)
    runner.forward()
    benchmark(runner.forward)


@pytest.mark.parametrize(("case", "contender"), BACKWARD)
def test_backward(benchmark, case, contender):
    benchmark.group = f"{case.name} backward"
    runner = Runner(case, contender)
    benchmark.pedantic(
        lambda gradients: gradients(), setup=lambda: ((runner.prepare_backward(),), {}), rounds=20, warmup_rounds=2
    )
