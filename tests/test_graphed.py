"""Functions as CUDA graphs: what surrounds the capture, with graphs that run the function again instead of replaying kernels.

The graphs themselves are in test_gpu_models.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import small
import torch
from torch import nn

from segnext import trainer
from segnext.data import Scenes
from segnext.graphed import WARM_UP, Graphed
from segnext.recipes import Recipe
from segnext.trainer import Trainer

SCENES = Scenes(8, (32, 48))
RECIPE = Recipe(iterations=4, batch=4, lr=5e-3, head_lr=1.0, warmup=0.05)


class Rerun(Graphed):
    """Its graph runs the function, adds to the gradients where they were when it was captured, wherever they are now, and
    writes the result to where the captured one is."""

    def _capture(self, tensors):
        super()._capture(tensors)
        self.graph.replay = self._run

    def _run(self):
        now = [parameter.grad for parameter, _ in self.gradients]
        for parameter, place in self.gradients:
            parameter.grad = place.detach()
        self.result.copy_(self.function(*self.given))
        for (parameter, _), grad in zip(self.gradients, now, strict=True):
            parameter.grad = grad


def moved(model: nn.Module) -> None:
    """Every gradient lies elsewhere, as after ``model.to``, which keeps the tensor and gives it other memory."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data = parameter.grad.clone()


BETWEEN = {"nothing": lambda model: None, "moved": moved, "dropped": lambda model: model.zero_grad()}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork(devices=[]))
    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "device", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, **options: nullcontext())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_a_training_goes_as_without(precision, accumulate, between, monkeypatch):
    """The calls before the capture leave no trace: statistics, gradients and random numbers are as if they had not been."""
    monkeypatch.setattr(trainer, "Graphed", Rerun)
    found = []
    for graphed in (False, True):
        model = small.model(num_classes=10, dropout=0.3, drop_path=0.3, bases="random")
        loop, losses = Trainer(model, SCENES, replace(RECIPE, precision=precision), accumulate=accumulate), []
        loop.graphed = graphed
        for step in loop.steps():
            between(model)
            losses.append(step.loss)
        found.append((losses, model.state_dict()))
    (losses, state), (graphed_losses, graphed_state) = found
    assert losses == graphed_losses
    assert all(torch.equal(graphed_state[name], value) for name, value in state.items())


def test_it_is_captured_once_and_takes_other_shapes_as_they_are():
    calls = []

    def function(x, y):
        calls.append(x)
        return x * y

    graphed, x, y = Rerun(function), torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(graphed(x, y), x * y)
    assert len(calls) == WARM_UP + 2  # captured, and launched
    graph, first = graphed.graph, graphed(x, y)
    assert torch.equal(graphed(y, y), y * y) and torch.equal(first, y * y)  # in the same memory
    assert torch.equal(graphed(x[:2], y[:2]), (x * y)[:2]) and calls[-1].shape == (2, 4)
    assert torch.equal(graphed(x.double(), y), x.double() * y)
    assert graphed.graph is graph and not any(call is x for call in calls)


def test_parameters_without_a_gradient_keep_none():
    """So that the optimizer passes them by, as without a graph."""
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})

    def function(x):
        loss = model["used"](x).sum()
        loss.backward()
        return loss.detach()

    graphed, x = Rerun(function, model), torch.randn(5, 3)
    graphed(x)
    assert model["unused"].weight.grad is None
    torch.testing.assert_close(model["used"].weight.grad, x.sum(0).expand(2, 3))


def test_the_cpu_has_none():
    assert not Trainer(small.model(num_classes=10), SCENES, RECIPE).graphed
