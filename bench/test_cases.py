"""The registry under pytest-benchmark: ``pytest bench/ -k "msca_strips and float32 and fused"``."""

import pytest
import torch

from .cases import CASES
from .measure import Runner


def turns(direction: str) -> list:
    return [
        pytest.param(case, contender, id=f"{case.name}-{contender.label.replace(' ', '-')}", marks=_marks(contender))
        for case in CASES.values()
        if direction in case.directions
        for contender in case.contenders
    ]


def _marks(contender) -> list[pytest.MarkDecorator]:
    why = contender.why_not()
    return [pytest.mark.skip(reason=why)] if why else []


def _time(benchmark, case, contender, direction: str) -> None:
    benchmark.group = f"{case.name} {direction}"
    call = getattr(Runner(case, contender), direction)
    call()
    benchmark(call)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize(("case", "contender"), turns("forward"))
def test_forward(benchmark, case, contender):
    _time(benchmark, case, contender, "forward")


@pytest.mark.parametrize(("case", "contender"), turns("backward"))
def test_backward(benchmark, case, contender):
    benchmark.group = f"{case.name} backward"
    runner = Runner(case, contender)
    benchmark.pedantic(
        lambda gradients: gradients(), setup=lambda: ((runner.prepare_backward(),), {}), rounds=20, warmup_rounds=2
    )


@pytest.mark.parametrize(("case", "contender"), turns("step"))
def test_step(benchmark, case, contender):
    _time(benchmark, case, contender, "step")
