"""Times contenders in turns within one process and compares their results with float64."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor

from .case import Case, Contender, device

WARM_UP, TURN = 0.002, 0.005  # seconds of calls in a turn, untimed and timed
LARGER_THAN_L2 = 256 << 20  # bytes, which a GPU writes for a tenth of a millisecond that the host has in advance


@dataclass
class Measurement:
    """How one contender did in one direction of a case: seconds per call in every round, and its error.

    ``error`` is the largest difference from the float64 result, as a part of that result's largest value; in backward the
    worst of all gradients. For labels it is the share of those that differ.
    """

    case: Case
    direction: str
    contender: Contender
    error: float
    rounds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return median(self.rounds)

    @property
    def quartiles(self) -> list[float]:
        """The first and the third, between which half of the rounds lie."""
        return quantiles(self.rounds, n=4, method="inclusive")[::2]

    def ratio(self, other: Measurement) -> float:
        """How many times longer ``other`` takes: the median over rounds, so that the machine's drift cancels."""
        return median(theirs / mine for mine, theirs in zip(self.rounds, other.rounds, strict=True))


class Runner:
    """One contender with its inputs, ready to be called."""

    def __init__(self, case: Case, contender: Contender) -> None:
        self.case, self.contender = case, contender
        self.inputs = case.inputs(contender.layout)
        self.call = contender.build()
        self.grad_out: Tensor | None = None

    def forward(self) -> list[Tensor]:
        """The result, as in inference."""
        with torch.no_grad():
            return [self.call(*self.inputs)]

    def prepare_backward(self) -> Callable[[], list[Tensor]]:
        """Runs forward, as in training, and returns what then computes the gradients of the inputs."""
        y = self.call(*self.inputs)
        if self.grad_out is None:
            self.grad_out = self.case.grad_out(y)
        return lambda: gradients(y, self.inputs, self.grad_out)

    def step(self) -> list[Tensor]:
        """Forward and backward: the result and the gradients of the inputs, or what a training step returns."""
        y = self.call(*self.inputs)
        if not self.case.gradients:
            return list(y)
        if self.grad_out is None:
            self.grad_out = self.case.grad_out(y)
        return [y.detach(), *gradients(y, self.inputs, self.grad_out)]

    def prepare(self, direction: str) -> Callable[[], list[Tensor]]:
        return {"forward": lambda: self.forward, "backward": self.prepare_backward, "step": lambda: self.step}[direction]()


def gradients(y: Tensor, inputs: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    """Of the inputs that need one."""
    return list(torch.autograd.grad(y, [tensor for tensor in inputs if tensor.requires_grad], grad_out))


def error(case: Case, runner: Runner, direction: str, truth: list[Tensor]) -> float:
    """See :class:`Measurement`; ``truth`` comes from :func:`exact`."""
    differences = [_difference(a, b) for a, b in zip(runner.prepare(direction)(), truth, strict=True)]
    return torch.tensor(differences, dtype=torch.float64).max().item()  # nan if one is


def _difference(found: Tensor, truth: Tensor) -> float:
    if not truth.is_floating_point():
        return (found != truth).double().mean().item()
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


def exact(case: Case, direction: str) -> list[Tensor]:
    """The float64 result (forward), gradients (backward) or both (step) of the case's reference."""
    inputs = case.inputs(dtype=torch.float64)
    if direction == "forward" or not case.gradients:
        with torch.no_grad():
            y = case.reference(*inputs)
        return [y] if direction == "forward" else list(y)
    y = case.reference(*inputs)
    result = [] if direction == "backward" else [y.detach()]
    return [*result, *gradients(y, inputs, case.grad_out(y))]


def measure(
    case: Case,
    direction: str,
    seconds: float = 3.0,
    contenders: tuple[Contender, ...] | None = None,
    absent: dict[str, str] | None = None,
) -> list[Measurement]:
    """Times every contender once a round, in an order that changes, until the time is over and five rounds are done.

    Args:
        seconds: for all rounds; building the contenders and finding their errors comes before.
        contenders: those of the case that can run here, unless told.
        absent: where it is given, a peer that fails before it is timed is left out and its reason put here.
    """
    if device().type == "cuda":  # graphs of the last case, which keep their memory
        gc.collect()
        torch.cuda.empty_cache()
    torch.compiler.reset()  # what was compiled for other shapes counts against the limit of recompilations
    contenders = case.present() if contenders is None else contenders
    truth = exact(case, direction)
    made = [_turn(case, direction, contender, truth, absent) for contender in contenders]
    turns = [turn for turn in made if turn]
    results, order = [result for result, _ in turns], random.Random(0)
    time = _time_on_gpu if device().type == "cuda" else _time_calls
    end = perf_counter() + seconds
    while perf_counter() < end or len(results[0].rounds) < 5:
        order.shuffle(turns)
        for result, runner in turns:
            time(runner, direction, WARM_UP)  # the previous contender's threads may still spin
            result.rounds.append(time(runner, direction, TURN))
    return results


def _turn(
    case: Case, direction: str, contender: Contender, truth: list[Tensor], absent: dict[str, str] | None
) -> tuple[Measurement, Runner] | None:
    try:
        runner = Runner(case, contender)
        return Measurement(case, direction, contender, error(case, runner, direction, truth)), runner
    except Exception as problem:  # the peer's own, of many kinds
        if contender.ours or absent is None:
            raise
        first, *_ = str(problem).strip().splitlines() or [""]
        absent[f"{contender.label} of {case.name}, {direction}"] = f"{type(problem).__name__}: {first}"
        return None


def _time_calls(runner: Runner, direction: str, seconds: float) -> float:
    spent, calls = 0.0, 0
    while spent < seconds:
        call = runner.prepare(direction)
        start = perf_counter()
        result = call()
        spent += perf_counter() - start
        calls += 1
        del call, result
    return spent / calls


def _time_on_gpu(runner: Runner, direction: str, seconds: float) -> float:
    """Between events, as the GPU comes to them, with nothing of the data in its L2.

    Meanwhile the host runs ahead; where it does not, because there is more to launch than to compute, its time is what counts.
    """
    spent, calls = 0.0, 0
    other = torch.empty(LARGER_THAN_L2, dtype=torch.uint8, device=device())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while spent < seconds:
        call = runner.prepare(direction)
        other.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        spent += start.elapsed_time(end) / 1e3
        calls += 1
        del call, result
    return spent / calls
